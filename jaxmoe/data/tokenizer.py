"""Text to token ids and back: byte-level BPE, plain bytes, and what others' files hold.

Every tokenizer is one JSON text, which a data set and a run keep as tokenizer.json: the format of
the `tokenizers` library, or {"kind": "bytes"}, or {"kind": "sentencepiece", "model": base64}.
`jaxmoe/data/tokenizer_files.py` makes it from the files of other libraries.
"""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmoe.data import ranks
from jaxmoe.errors import UserError
from jaxmoe.outside import loads

__all__ = ["EOT", "SPECIALS", "Tokenizer", "bytes_tokenizer", "train_bpe"]

EOT = "<|eot|>"  # end of text, after every document
# What each role's token is called in the field; the first is ours.
SPECIALS = {
    "eot": (EOT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
    + ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    "pad": ("<|pad|>", "<pad>", "<|padding|>", "[PAD]", "<|finetune_right_pad_id|>"),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "[PREFIX]"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "[MIDDLE]"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "[SUFFIX]"),
}
MOST_IDS = 1 << 24
_BYTES_JSON = '{"kind": "bytes"}'
# GPT-4's split, made for code: whitespace with a line end in it, indentation included, is one
# piece. No rule for 's and 'll: the letters' rule takes a quote along, and f'self' stays whole.
_PIECES = ranks.PATTERNS["jaxmoe-1"]
# A regular expression with lookahead overflows its stack on longer runs of white space (at 10**6).
_LONG_RUN = re.compile(r"\s{100000}")


class Tokenizer:
    """Ids are under `vocab_size`; no text, not even a special token's name, encodes to a special.

    Attributes:
        json: the whole tokenizer; `fingerprint` is 16 hex digits of its SHA-256.
        kind: bytes, sentencepiece, or the model of the `tokenizers` library (bpe, unigram, ...).
        specials: ids by role: eot always, and of pad, fim_prefix, fim_middle, fim_suffix those
            that it has.
        dtype: the smallest little-endian type that holds every id.
        exact: whether decoding gives every text back, byte for byte, by construction.
        threads: how many encode a batch; None is all cores.
    """

    def __init__(self, text: str) -> None:
        self.json = text
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.threads: int | None = None
        try:
            self._read(text)
        except UserError:
            raise
        except Exception as error:  # `tokenizers` raises Exception itself, and others by the value
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"not a tokenizer that can be read ({said[:300]})") from None

    def _read(self, text: str) -> None:
        tree = loads(text)
        self._bpe: Any = None
        self._pieces: Any = None
        self._fast: Any = None
        if tree.get("kind") == "bytes":
            self.kind, self.exact = "bytes", True
            self.vocab_size, self.specials = 257, {"eot": 256}
        elif tree.get("kind") == "sentencepiece":
            self.kind, self.exact = "sentencepiece", False
            self._pieces = _sentencepiece(base64.b64decode(tree["model"]))
            self.vocab_size, self.specials = _piece_ids(self._pieces)
        else:
            self.kind = str(tree["model"].get("type", "bpe")).lower()
            self.exact = ranks.byte_level(tree)
            self._bpe = _library().Tokenizer.from_str(text)
            self._bpe.encode_special_tokens = True  # the characters <|eot|> are text like any other
            ids = self._bpe.get_vocab(with_added_tokens=True)
            self.vocab_size, self.specials = max(ids.values()) + 1, _roles(ids)
        if self.vocab_size > MOST_IDS:
            raise UserError(f"an id of {self.vocab_size - 1}: there are tables of all ids below it")
        self.eot: int = self.specials["eot"]
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, [tokens] of `dtype`, without `eot`. Uses all cores."""
        if self.kind == "bytes":
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        if self._pieces is not None:
            threads = self.threads or os.cpu_count() or 1
            rows = self._pieces.encode(list(texts), out_type=int, num_threads=threads)
            return [np.array(r, self.dtype) for r in rows]
        if self._fast is None:
            self._fast = ranks.encoding(self.json) or False
        if not self._fast:
            return self._encode_slowly(texts)
        if self.threads == 1 or len(texts) < 2:
            return [self._encode_fast(t) for t in texts]
        with ThreadPoolExecutor(self.threads) as pool:  # the encoder lets go of Python's lock
            return list(pool.map(self._encode_fast, texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; specials by their names, and the cut halves of a character as U+FFFD."""
        ids = np.asarray(ids, np.int64)
        if self.kind == "bytes":
            parts = (bytes([i]) if i != self.eot else EOT.encode() for i in ids.tolist())
            return b"".join(parts).decode(errors="replace")
        if self._pieces is not None:
            cuts = [0, *(np.flatnonzero(ids == self.eot) + 1).tolist(), len(ids)]
            rows = (ids[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False))
            return "".join(
                self._pieces.decode(r) + (EOT if r and r[-1] == self.eot else "") for r in rows
            )
        return self._bpe.decode(ids.tolist(), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of every id, b"" of specials; None where ids are not runs of bytes."""
        if self.kind == "bytes":
            return [*(bytes([i]) for i in range(256)), b""]
        if not self.exact:
            return None
        found = [b""] * self.vocab_size
        for token, i in ranks.spelt(loads(self.json)).items():
            found[i] = token
        return found

    def _encode_fast(self, text: str) -> np.ndarray:
        if len(text) >= 100_000 and _LONG_RUN.search(text):
            return self._encode_slowly([text])[0]
        return self._fast.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def _encode_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, self.dtype) for e in encoded]


def bytes_tokenizer() -> Tokenizer:
    """The 256 bytes, and 256 for the end of text."""
    return Tokenizer(_BYTES_JSON)


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learns merges until there are exactly `vocab_size` ids. The same texts give the same ids.

    Raises:
        UserError: the texts have too few repeated pairs, or `vocab_size` does not hold the bytes.
    """
    if vocab_size < 257:
        raise UserError(f"model.vocab_size={vocab_size}: 256 bytes and {EOT} need at least 257")
    bpe = learn(texts, vocab_size, _PIECES, [EOT])
    learnt = bpe.get_vocab_size()
    if learnt < vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: {sum(map(len, texts))} characters of training text "
            f"only give {learnt} tokens; set it to {learnt} or less, or give more text"
        )
    return Tokenizer(bpe.to_str())


def learn(
    texts: Any,
    vocab_size: int,
    pattern: str,
    specials: list[str],
    longest: int | None = None,
) -> Any:
    """A byte-level BPE of the `tokenizers` library, of at most `vocab_size` ids.

    `longest`: bytes of a token at most.
    """
    lib = _library()
    bpe = lib.Tokenizer(lib.models.BPE())
    split = lib.pre_tokenizers.Split(lib.Regex(pattern), "isolated")
    spell = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence([split, spell])
    bpe.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=specials,
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=longest,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _roles(ids: dict[str, int]) -> dict[str, int]:
    """Raises UserError when no token of `ids` ends a text."""
    found = {
        role: next((ids[n] for n in names if n in ids), None) for role, names in SPECIALS.items()
    }
    if found["eot"] is None:
        raise UserError(
            f"the tokenizer has no end of text: none of {', '.join(SPECIALS['eot'][:7])}; "
            "add one of them to its added_tokens"
        )
    return {role: i for role, i in found.items() if i is not None}


def _piece_ids(pieces: Any) -> tuple[int, dict[str, int]]:
    size = pieces.get_piece_size()
    specials = _roles({pieces.id_to_piece(i): i for i in range(size) if pieces.is_control(i)})
    return size, specials


def _sentencepiece(model: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"a sentencepiece model needs its library ({error}): jaxmoe[data]"
        ) from None
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"not a sentencepiece model: {error}") from None
    return pieces


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"BPE needs tokenizers ({error}): pip install tokenizers") from None
    return tokenizers
