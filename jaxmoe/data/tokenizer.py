"""Text to token ids and back, exactly: byte-level BPE, or plain bytes."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.errors import UserError

__all__ = ["EOT", "Tokenizer", "bytes_tokenizer", "train_bpe"]

EOT = "<|eot|>"  # end of text, after every document
_BYTES_JSON = '{"kind": "bytes"}'
# GPT-4's split, made for code: whitespace with a line end in it, indentation included, is one
# piece. No rule for 's and 'll: the letters' rule takes a quote along, and f'self' stays whole.
_PIECES = (
    r"\s*[\r\n]\s*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """Ids are under `vocab_size`; `eot` is never the encoding of any text, not even of its name.

    `json` is the whole tokenizer (for BPE the format of the `tokenizers` library), `fingerprint` 16
    hex digits of its SHA-256, and `dtype` the smallest little-endian type that holds every id.
    """

    def __init__(self, text: str) -> None:
        self.json = text
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.kind = "bytes" if json.loads(text).get("kind") == "bytes" else "bpe"
        self._bpe: Any = None
        if self.kind == "bytes":
            self.vocab_size, self.eot = 257, 256
        else:
            self._bpe = _library().Tokenizer.from_str(text)
            self._bpe.encode_special_tokens = True  # the characters <|eot|> are text like any other
            self.vocab_size, self.eot = self._bpe.get_vocab_size(), self._bpe.token_to_id(EOT)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, [tokens] of `dtype`, without `eot`. Uses all cores."""
        if self._bpe is None:
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        return [np.array(e.ids, self.dtype) for e in self._bpe.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; `eot` as <|eot|>, and the cut halves of a character as U+FFFD."""
        ids = np.asarray(ids, np.int64)
        if self._bpe is None:
            parts = (bytes([i]) if i != self.eot else EOT.encode() for i in ids.tolist())
            return b"".join(parts).decode(errors="replace")
        return self._bpe.decode(ids.tolist(), skip_special_tokens=False)


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
    lib = _library()
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    bpe = lib.Tokenizer(lib.models.BPE())
    split = lib.pre_tokenizers.Split(lib.Regex(_PIECES), "isolated")
    spell = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence([split, spell])
    bpe.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOT],
        initial_alphabet=alphabet,
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = bpe.get_vocab_size()
    if learnt < vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: {sum(map(len, texts))} characters of training text "
            f"only give {learnt} tokens; set it to {learnt} or less, or give more text"
        )
    return Tokenizer(bpe.to_str())


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"BPE needs tokenizers ({error}): pip install tokenizers") from None
    return tokenizers
