"""Byte-level BPE as ranks: tiktoken's form of it, and the way from and to the `tokenizers` form.

A rank file has a line a token, base64 of its bytes and its rank; the lower rank is merged first.
The `tokenizers` form lists which two parts each token is merged from. tiktoken merges any two
neighbours whose bytes are a token: the two agree if merging a token's own bytes by the lower ranks
ends in exactly the two listed parts, which `encoding` checks token by token before it is used.
"""

import base64
import binascii
import functools
import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.outside import loads

__all__ = ["PATTERNS", "byte_level", "encoding", "parse", "spelt", "to_json", "to_ranks", "write"]

# How text is cut before merging. Each matches every text whole (tiktoken drops what a pattern does
# not match), and the tests compare the two libraries on every Unicode character under each.
_GPT4_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT4_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "jaxmoe-1": (
        r"\s*[\r\n]\s*"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+"
        r"|\s+(?!\S)"
        r"|\s+"
    ),
    # The same pieces, in an order that is 10 % faster.
    "jaxmoe-2": (
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+"
        r"|[^\S\r\n]*[\r\n]\s*"
        r"|\s+(?!\S)"
        r"|\s"
    ),
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": _GPT4_WORDS + r"\p{N}{1,3}" + _GPT4_REST,  # cl100k, and Llama 3's
    "qwen2": _GPT4_WORDS + r"\p{N}" + _GPT4_REST,
}


def byte_level(tree: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json gives every text back: byte-level BPE, and nothing else done."""
    model = tree.get("model") or {}
    return (
        model.get("type", "BPE") == "BPE"
        and not tree.get("normalizer")
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (tree.get("decoder") or {}).get("type") == "ByteLevel"
        and _pattern(tree.get("pre_tokenizer")) is not None
        and set(_units().values()) <= model["vocab"].keys()
    )


@functools.lru_cache(maxsize=8)  # the check takes a second for 32,768 ids
def encoding(text: str) -> Any:
    """A tiktoken encoding with exactly the ids of a tokenizer.json; None where there is none.

    2 to 6 times faster than `tokenizers`. None without tiktoken, too.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    tree = loads(text)
    pattern = _pattern(tree.get("pre_tokenizer"))
    if not byte_level(tree) or pattern not in PATTERNS.values():
        return None
    if not all(t.get("special") for t in tree.get("added_tokens") or []):
        return None  # `tokenizers` finds the others in text
    assert pattern is not None
    ranks = to_ranks(tree)
    specials = _added(tree)
    ids = [*(ranks or {}).values(), *specials.values()]
    if ranks is None or len(set(ids)) != len(ids):  # tiktoken panics where two tokens have one id
        return None
    return tiktoken.Encoding(
        "jaxmoe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )


def to_ranks(tree: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Ranks of a byte-level tokenizer.json; None if they would not merge as its list does."""
    units = {c: b for b, c in _units().items()}
    try:
        ranks = spelt(tree)
        pairs = [m.split(" ") if isinstance(m, str) else m for m in tree["model"]["merges"]]
        merges = [tuple(bytes(units[c] for c in part) for part in pair) for pair in pairs]
    except KeyError:  # a token that is no bytes
        return None
    whole = tree["model"].get("ignore_merges", False)  # what no merge leads to is a whole piece
    if _merges(ranks) != merges or not (whole or len(ranks) == 256 + len(merges)):
        return None
    return ranks


def spelt(tree: Mapping[str, Any]) -> dict[bytes, int]:
    """Ids by the bytes of their tokens, without the added ones. KeyError: one that is no bytes."""
    units = {c: b for b, c in _units().items()}
    added = _added(tree)
    vocab = tree["model"]["vocab"].items()
    return {bytes(units[c] for c in token): i for token, i in vocab if token not in added}


def to_json(
    ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], where: str = "ranks"
) -> str:
    """A tokenizer.json with the ids of `ranks`, and special tokens by name.

    Raises:
        UserError: the ranks are no byte-level BPE.
    """
    units = _units()
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"{where}: byte {missing[0]} has no rank; a rank file has all 256")
    if len(set(ranks.values())) != len(ranks) or set(ranks.values()) & set(specials.values()):
        raise UserError(
            f"{where}: two tokens have one id; give the special tokens ids of their own"
        )
    spell = lambda token: "".join(units[b] for b in token)
    vocab = {spell(t): i for t, i in sorted(ranks.items(), key=lambda item: item[1])}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(n, i) for n, i in sorted(specials.items(), key=_by_id)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks a whole piece up before it merges
            "vocab": {**vocab, **specials},
            "merges": [[spell(a), spell(b)] for a, b in _merges(ranks)],
        },
    }
    return json.dumps(tree)


def parse(data: bytes, where: str) -> dict[bytes, int]:
    """Ranks of a rank file. Raises UserError with the line that is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{where}, line {number}: not base64, a space and a rank, as tiktoken's files have"
            ) from None
    return ranks


def write(ranks: Mapping[bytes, int]) -> bytes:
    """The rank file."""
    rows = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in rows)


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token of two bytes or more, by rank.

    Tokens that lower ranks do not lead to in two parts have none: only a whole piece is one.
    """
    found: list[tuple[bytes, bytes]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        cuts = list(range(len(token) + 1))  # part i is token[cuts[i] : cuts[i + 1]]
        pairs = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]
        while len(pairs) > 1:
            best = min(pairs)
            if best >= rank:
                break
            at = pairs.index(best)
            del cuts[at + 1], pairs[at]
            for i in (at - 1, at):  # the two pairs that the new part is in
                if 0 <= i < len(pairs):
                    pairs[i] = ranks.get(token[cuts[i] : cuts[i + 2]], rank)
        parts = [token[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def _pattern(pre_tokenizer: Any) -> str | None:
    """The split of a byte-level pre-tokenizer that changes no text; None for any other."""
    if not isinstance(pre_tokenizer, Mapping):
        return None
    parts = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers") or []
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(parts) == 1 and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if any(p.get("type") not in ("Split", "Digits") for p in parts[:-1]):
        return None
    first = parts[0]
    plain = first.get("behavior") == "Isolated" and not first.get("invert")
    if len(parts) == 2 and plain and not last.get("use_regex", True):
        return str((first.get("pattern") or {}).get("Regex", ""))
    return ""  # exact, but of no pattern that tiktoken has


def _added(tree: Mapping[str, Any]) -> dict[str, int]:
    return {t["content"]: t["id"] for t in tree.get("added_tokens") or []}


def _added_token(name: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **flags, "special": True}


def _by_id(item: tuple[str, int]) -> int:
    return item[1]


@functools.cache
def _units() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json.

    GPT-2's table: a byte that prints as Latin-1 is itself, the others are U+0100 on, in order.
    """
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in prints]
    return {**{b: chr(b) for b in prints}, **{b: chr(256 + i) for i, b in enumerate(others)}}
