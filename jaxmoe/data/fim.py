"""Fill in the middle (Bavarian et al., arXiv:2207.14255): documents cut in three and turned around.

    prefix first (PSM):  <prefix> A <suffix> C <middle> B eot
    suffix first (SPM):  <prefix> <suffix> C <middle> A B eot     (section 3; the second variant)

Whole documents are turned, before they are packed, so a long one may lie in several sequences. Cuts
are drawn by token, evenly. Which documents are turned differs from epoch to epoch, but not how many
are: of STRATUM neighbours always the same number, so that no index is needed to find a document.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxmoe.data.shuffle import hashed, make_key, ranks
from jaxmoe.data.store import Source
from jaxmoe.errors import UserError

__all__ = ["FimSource", "Sentinels", "restored", "sentinels"]

STRATUM = 16  # documents: bounds of so many are read to find one


class Sentinels(NamedTuple):
    """Token ids."""

    prefix: int
    middle: int
    suffix: int


def sentinels(specials: Mapping[str, int], source: str) -> Sentinels:
    """Of a tokenizer's special ids, for a source that wants them.

    Raises:
        UserError: the tokenizer has none.
    """
    names = [f"fim_{part}" for part in Sentinels._fields]
    missing = [name for name in names if name not in specials]
    if missing:
        raise UserError(
            f"data.sources {source!r}: fim_rate needs a tokenizer with {', '.join(names)}, and this"
            f" one has no {missing[0]}; take another tokenizer, or set fim_rate=0"
        )
    return Sentinels(*(specials[name] for name in names))


class FimSource:
    """A source with a share of its documents turned around; three tokens longer for each.

    It is the source of one epoch (`key` says which), of as many tokens in every one.
    """

    def __init__(
        self, source: Source, marks: Sentinels, *, rate: float, spm: float, key: int
    ) -> None:
        self.name, self.domain = source.name, source.domain
        self._source, self._marks, self._key = source, marks, key
        exact = Fraction(str(rate))
        self._top, self._bottom, self._spm = exact.numerator, exact.denominator, spm
        self._table = lru_cache(maxsize=8192)(self._make_table)  # 8 MB

    @property
    def tokens(self) -> int:
        return self._source.tokens + 3 * self._before(self.documents)

    @property
    def documents(self) -> int:
        return self._source.documents

    def read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"{self.name}: {start}..{stop} of {self.tokens} tokens")
        out = np.empty(stop - start, np.int32)
        document, at = self.find(start) if start < stop else 0, start
        while at < stop:
            begin, end = self.bounds(document) if document >= 0 else (0, 1)
            last = min(end, stop)
            self._read_part(document, at - begin, out[at - start : last - start])
            at, document = last, document + 1
        return out

    def bounds(self, document: int) -> tuple[int, int]:
        table, at = self._table(document // STRATUM), document % STRATUM
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.name}: document {document} of {self.documents}")
        return int(table.starts[at]), int(table.starts[at + 1])

    def find(self, token: int) -> int:
        if token < 1:
            return -1
        low, high = 0, -(-self.documents // STRATUM)
        while high - low > 1:  # the last stratum that begins at the token or before
            middle = (low + high) // 2
            first = self._source.bounds(middle * STRATUM)[0] + 3 * self._before(middle * STRATUM)
            low, high = (middle, high) if first <= token else (low, middle)
        return low * STRATUM + int(np.searchsorted(self._table(low).starts, token, "right")) - 1

    def parts(self, document: int) -> list[int | tuple[int, int]]:
        """What it is now: sentinels, and (start, stop) of the source, its eot at last."""
        start, stop = self._source.bounds(document)
        table, at = self._table(document // STRATUM), document % STRATUM
        if not table.turned[at]:
            return [(start, stop)]
        low, high = sorted(start + int(cut) % (stop - start) for cut in table.draws[at, :2])
        prefix, middle, suffix = (start, low), (low, high), (high, stop - 1)
        mark, eot = self._marks, (stop - 1, stop)
        if int(table.draws[at, 2]) >= round(self._spm * 2.0**64):
            return [mark.prefix, prefix, mark.suffix, suffix, mark.middle, middle, eot]
        return [mark.prefix, mark.suffix, suffix, mark.middle, prefix, middle, eot]

    def _read_part(self, document: int, skip: int, out: np.ndarray) -> None:
        """Fills `out` with a document's tokens from `skip` on; reads no others."""
        filled = 0
        for part in self.parts(document) if document >= 0 else [(0, 1)]:
            begin, end = (0, 1) if isinstance(part, int) else part
            begin, skip = begin + min(skip, end - begin), max(0, skip - (end - begin))
            n = min(end - begin, len(out) - filled)
            if n:
                what = part if isinstance(part, int) else self._source.read(begin, begin + n)
                out[filled : filled + n] = what
                filled += n

    def _before(self, document: int) -> int:
        """How many documents are turned before the first of a stratum (or the end)."""
        # Rounded; integers, since Fraction took half of the time of a sequence.
        return (2 * self._top * document + self._bottom) // (2 * self._bottom)

    def _make_table(self, stratum: int) -> "_Table":
        first = stratum * STRATUM
        size = min(STRATUM, self.documents - first)
        n = self._before(first + size) - self._before(first)
        turned = ranks(size, make_key("turned", self._key, stratum)) < n
        bounds = [self._source.bounds(first + i) for i in range(size)]
        starts = np.array([bounds[0][0], *(stop for _, stop in bounds)])
        starts += 3 * (self._before(first) + np.append(0, np.cumsum(turned)))
        draws = hashed(np.arange(3 * size), make_key("cut", self._key, stratum))
        return _Table(starts, turned, draws.reshape(size, 3))


class _Table(NamedTuple):
    """Of one stratum."""

    starts: np.ndarray  # int64 [documents + 1]: where each begins, and the last one ends
    turned: np.ndarray  # bool [documents]
    draws: np.ndarray  # uint64 [documents, 3]: two cuts, and which way round


def restored(document: Sequence[int] | np.ndarray, marks: Sentinels) -> np.ndarray:
    """The text of a whole turned document in its own order, without sentinels; others unchanged."""
    tokens = np.asarray(document)
    if not len(tokens) or tokens[0] != marks.prefix:
        return tokens
    suffix = int(np.flatnonzero(tokens == marks.suffix)[0])
    middle = int(np.flatnonzero(tokens == marks.middle)[0])
    parts = tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle], tokens[-1:]
    return np.concatenate(parts)
