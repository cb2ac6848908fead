"""Passages as hashes: every window of a text, and the index of those that are held out.

chars50    50 letters or digits in a row, all else left out (GPT-4 technical report, appendix C)
ngram13    13 words in a row, a word being a run of letters and digits (GPT-3, arXiv:2005.14165, C)

Both fold case, accents and full-width forms, so that a copy in another layout has the same windows.
chars50 also sees through whitespace put into words or taken out between them.
"""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

__all__ = ["COMMON", "SIZE", "Found", "Index", "Method", "build_index", "find", "hashes", "passage"]

Method = Literal["chars50", "ngram13"]
SIZE = {"chars50": 50, "ngram13": 13}
COMMON = 3  # held-out documents; a passage in so many is a licence header or a template
_REPEATED = 0.9  # of a document's windows in others too: then it is no header, and is looked for
_REPEATED_WINDOWS = 1_000  # licences have 500 to 1,300 letters (Apache header 480, MIT 850)
_CHUNK = 1 << 15  # letters hashed at a time: five arrays of it lie in a core's cache
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_BITS = 16  # of the bitmap, for a window, at the least


def hashes(text: bytes, method: Method) -> np.ndarray:
    """[windows] uint64 of UTF-8 text, in order; polynomials modulo 2**64.

    A text of fewer than 50 letters (or 13 words) has none.
    """
    codes = _codes(text)
    return _chars(codes[codes != 0]) if method == "chars50" else _words(codes)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of some documents: their windows, and those of them that are held out."""

    windows: np.ndarray  # [documents] int64
    document: np.ndarray  # [hits] int64, ascending
    window: np.ndarray  # [hits] int64: which of the document's
    place: np.ndarray  # [hits] int64: where in the index


def find(texts: Sequence[bytes], indexes: Sequence["Index"], method: Method) -> list[Found]:
    """Windows in `texts` that are held out, by index.

    Texts are hashed together, because one numpy call costs as much as 1 kB of text; ASCII and
    others apart, because a few other characters would slow down all.
    """
    windows = np.zeros(len(texts), np.int64)
    parts: list[list[_Hits]] = [[] for _ in indexes]
    for ascii in (True, False):
        numbers = np.array([n for n, t in enumerate(texts) if t.isascii() == ascii], np.int64)
        if len(numbers):
            hashed, units = _hashed_together([texts[n] for n in numbers], method)
            windows[numbers] = np.maximum(np.diff(units) - SIZE[method] + 1, 0)
            for index, hits in zip(indexes, parts, strict=True):
                whose, window, place = _hits(index, hashed, units, SIZE[method])
                hits.append((numbers[whose], window, place))
    return [_found(windows, hits) for hits in parts]


_Hits = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each hit: text, window in it, place in index


def _found(windows: np.ndarray, parts: Sequence[_Hits]) -> Found:
    none = [np.empty(0, np.int64)]
    text, window, place = (np.concatenate([*none, *p]) for p in zip(*parts, strict=True))
    order = np.argsort(text, kind="stable")
    return Found(windows=windows, document=text[order], window=window[order], place=place[order])


def _hashed_together(texts: Sequence[bytes], method: Method) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all; [texts + 1]: letters, or words, before each text)."""
    codes = _codes(b"\n".join([*texts, b""]))  # so that words of two texts do not grow together
    sizes = [len(t) if t.isascii() else len(t.decode(errors="replace")) for t in texts]
    starts = np.cumsum([0, *(s + 1 for s in sizes)])
    kept = codes != 0
    if method == "ngram13":
        at = np.flatnonzero(kept)
        return _words(codes), np.searchsorted(at[_word_starts(at)], starts)
    counts = np.add.reduceat(kept.view(np.uint8), starts[:-1], dtype=np.int64)
    return _chars(codes[kept]), np.cumsum([0, *counts])


def _hits(index: "Index", hashed: np.ndarray, units: np.ndarray, size: int) -> _Hits:
    hit, place = index.find(hashed)
    whose = np.searchsorted(units, hit, "right") - 1
    inside = hit + size <= units[whose + 1]  # others lie across two texts
    hit, place, whose = hit[inside], place[inside], whose[inside]
    return whose, hit - units[whose], place


def passage(text: bytes, method: Method, window: int) -> str:
    """What stands in `text` at a window, as it is written there."""
    codes = _codes(text)
    at = np.flatnonzero(codes)
    starts = _word_starts(at)
    if method == "ngram13":
        last = window + SIZE[method]
        end = at[starts[last] - 1] if last < len(starts) else at[-1]
        first = at[starts[window]]
    else:
        first, end = at[window], at[window + SIZE[method] - 1]
    if text.isascii():
        return text[first : end + 1].decode()
    return text.decode(errors="replace")[first : end + 1]


class Index:
    """The held-out windows, sorted: at most 16 bytes each, in files that processes share.

    Windows in `common` held-out documents or more are left out (0: none are), except where nearly
    all of a long document is such: variants of one text are still looked for.
    """

    def __init__(self, hashes: np.ndarray, owners: np.ndarray, bitmap: np.ndarray) -> None:
        self.hashes = hashes  # [W] uint64, ascending
        self.owners = owners  # [W] uint32: the first document that a window is in
        self._bitmap = bitmap  # [2**n] uint8: a Bloom filter of two bits a window
        self._shift = np.uint64(64 - (8 * len(bitmap) - 1).bit_length())

    def __len__(self) -> int:
        return len(self.hashes)

    def save(self, folder: Path) -> None:
        """Files for `open`, in a folder of the process's own."""
        for name in ("hashes", "owners", "bitmap"):
            array = getattr(self, "_bitmap" if name == "bitmap" else name)
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        arrays = [_mapped(folder / f"{n}.npy") for n in ("hashes", "owners", "bitmap")]
        return cls(*arrays)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `hashes` [n] are held out, and where in the index: two int64 [hits]."""
        none = np.empty(0, np.int64)
        if not len(self):
            return none, none
        found = [none]
        for start in range(0, len(hashes), _CHUNK):
            part = hashes[start : start + _CHUNK]
            at = np.flatnonzero(self._maybe(part >> self._shift))
            # The low bits of a product are weak: the second bit's place is mixed from all.
            at = at[self._maybe((part[at] * np.uint64(_BASE)) >> self._shift)]
            found.append(at + start)
        asked = np.concatenate(found)
        suspects = hashes[asked]
        order = np.argsort(suspects)  # in order the search stays in the cache: 10 times faster
        place = np.empty(len(suspects), np.int64)
        place[order] = np.searchsorted(self.hashes, suspects[order])
        place = place.clip(max=len(self) - 1)
        hit = self.hashes[place] == suspects
        return asked[hit], place[hit]

    def _maybe(self, bits: np.ndarray) -> np.ndarray:
        """[n] bool: whether a bit is set."""
        places = bits.view(np.int64)
        byte = self._bitmap.take(places >> 3, mode="clip")
        return ((byte >> (places.astype(np.uint8) & np.uint8(7))) & np.uint8(1)).view(bool)


def build_index(documents: Sequence[np.ndarray], common: int = COMMON) -> tuple[Index, np.ndarray]:
    """The index of the windows of each held-out document.

    Returns it, and for each document how many of its windows are in it: 0 cannot be checked.
    """
    each = [np.unique(d) for d in documents]
    owners = np.repeat(np.arange(len(each), dtype=np.uint32), [len(d) for d in each])
    joined = np.concatenate([np.empty(0, np.uint64), *each])
    order = np.argsort(joined, kind="stable")  # so that the first owner comes first
    joined, owners = joined[order], owners[order]
    first = np.flatnonzero(np.r_[True, joined[1:] != joined[:-1]][: len(joined)])
    counts = np.diff(np.r_[first, len(joined)])
    kept = counts < common if common else np.ones(len(first), bool)
    kept |= _in_repeated(np.repeat(kept, counts), owners, first, counts, [len(d) for d in each])
    covered = np.bincount(owners[np.repeat(kept, counts)], minlength=len(each))
    table, whose = joined[first[kept]], owners[first[kept]]
    return Index(table, whose, _bitmap(table)), covered


def _in_repeated(
    kept: np.ndarray, owners: np.ndarray, first: np.ndarray, counts: np.ndarray, sizes: list[int]
) -> np.ndarray:
    """[unique windows] bool: those of long documents that are nearly all common."""
    total = np.array(sizes, np.int64)
    lost = np.bincount(owners[~kept], minlength=len(sizes))
    again = (lost > _REPEATED * total) & (total >= _REPEATED_WINDOWS)
    if not len(first):
        return np.empty(0, bool)
    return np.logical_or.reduceat(again[owners], first)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, "r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        return np.load(path, allow_pickle=False)


def _bitmap(table: np.ndarray) -> np.ndarray:
    bits = max(16, (_BITS * len(table) - 1).bit_length())
    bitmap = np.zeros(1 << (bits - 3), np.uint8)
    shift = np.uint64(64 - bits)
    for keys in (table, table * np.uint64(_BASE)):
        places = (keys >> shift).view(np.int64)
        bit = np.left_shift(np.uint8(1), (places & 7).astype(np.uint8))
        np.bitwise_or.at(bitmap, places >> 3, bit)
    return bitmap


def _codes(text: bytes) -> np.ndarray:
    """A number for every byte of ASCII text, or every character of other text; 0: left out.

    uint8 or uint32; the same letter has the same number in both.
    """
    if text.isascii():
        return np.frombuffer(text.translate(_ascii_folds()), np.uint8)
    # Whole files may come with a byte order mark or cut characters: neither is a letter.
    points = np.frombuffer(text.decode(errors="replace").encode("utf-32-le"), "<u4")
    return _folds()[points]


@functools.cache
def _ascii_folds() -> bytes:
    return bytes(ord(chr(b).lower()) if b < 128 and chr(b).isalnum() else 0 for b in range(256))


@functools.cache
def _folds() -> np.ndarray:
    """[0x110000] uint32: what a character counts as; 0 for all but letters and digits.

    One base letter where the compatible decomposition has one (accents, full width); else its own
    lower case: a Hangul syllable has several letters, and stays whole.
    """
    table = np.zeros(0x110000, np.uint32)
    for point in range(len(table)):
        letter = chr(point)
        if letter.isalnum():
            parts = [c for c in unicodedata.normalize("NFKD", letter.lower()) if c.isalnum()]
            table[point] = ord(parts[0] if len(parts) == 1 else letter.lower()[0])
    return table


@functools.cache
def _values() -> np.ndarray:
    """[256] uint64, of ASCII letters."""
    return _mixed(np.arange(256, dtype=np.uint64))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), so that letters look random."""
    x = (x + np.uint64(1)) * np.uint64(_BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _powers(inverse: bool) -> np.ndarray:
    base = pow(_BASE, -1, 2**64) if inverse else _BASE
    return np.full(_CHUNK + SIZE["chars50"], base, np.uint64).cumprod()


def _chars(letters: np.ndarray) -> np.ndarray:
    """A window is a difference of two prefix sums, divided by the power at its start."""
    size = SIZE["chars50"]
    count = max(0, len(letters) - size + 1)
    out = np.empty(count, np.uint64)
    powers, inverses = _powers(False), _powers(True)
    sums = np.zeros(min(_CHUNK, count) + size, np.uint64)
    for start in range(0, count, _CHUNK):
        part = letters[start : start + _CHUNK + size - 1]
        here = sums[1 : len(part) + 1]
        if part.dtype == np.uint8:
            np.take(_values(), part, out=here, mode="clip")
        else:
            here[:] = _mixed(part.astype(np.uint64))
        np.multiply(here, powers[: len(part)], out=here)
        np.cumsum(here, out=here)
        to = out[start : start + len(part) - size + 1]
        np.subtract(sums[size : len(part) + 1], sums[: len(to)], out=to)
        np.multiply(to, inverses[: len(to)], out=to)
    return out


def _word_starts(at: np.ndarray) -> np.ndarray:
    """Where words begin among the letters, whose places in the text are `at`."""
    return np.flatnonzero(np.r_[True, at[1:] != at[:-1] + 1][: len(at)])


def _words(codes: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(codes)
    starts = _word_starts(at)
    size = SIZE["ngram13"]
    if len(starts) < size:
        return np.empty(0, np.uint64)
    inside = np.arange(len(at)) - np.repeat(starts, np.diff(np.r_[starts, len(at)]))
    powers = _powers(False)
    letters = _mixed(codes[at].astype(np.uint64)) * powers[inside % _CHUNK]
    words = _mixed(np.add.reduceat(letters, starts))
    count = len(words) - size + 1
    out = np.zeros(count, np.uint64)
    for n in range(size):
        out += words[n : n + count] * powers[n]
    return out
