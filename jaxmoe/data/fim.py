"""Fill in the middle (Bavarian et al., arXiv:2207.14255): documents cut in three and turned around.

    prefix first (PSM):  <prefix> A <suffix> C <middle> B eot
    suffix first (SPM):  <prefix> <suffix> C <middle> A B eot     (section 3; the second variant)

Whole documents are turned, before they are packed, so a long one may lie in several sequences. Cuts
are drawn by token, evenly. Which documents are turned differs from epoch to epoch, but not how many
are: of STRATUM neighbours always the same number, so that no index is needed to find a document.
"""

from bisect import bisect_right
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
        self._top, self._bottom = exact.numerator, exact.denominator
        self._least_psm = round(spm * 2.0**64)
        self._mark_tokens = [np.array([mark], np.int32) for mark in marks]
        self._table = lru_cache(maxsize=8192)(self._make_table)  # 32 MB

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
        if document < 0:
            out[0] = self._source.read(0, 1)[0]
            document, at = 0, 1
        while at < stop:
            table, place = self._table(document // STRATUM), document % STRATUM
            begin, last = table.starts[place], min(table.starts[place + 1], stop)
            self._read_part(table, place, at - begin, out[at - start : last - start])
            at, document = last, document + 1
        return out

    def bounds(self, document: int) -> tuple[int, int]:
        table, at = self._table(document // STRATUM), document % STRATUM
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.name}: document {document} of {self.documents}")
        return table.starts[at], table.starts[at + 1]

    def find(self, token: int) -> int:
        if token < 1:
            return -1
        low, high = self._near(token)
        while high - low > 1:  # the last stratum that begins at the token or before
            middle = (low + high) // 2
            first = self._source.bounds(middle * STRATUM)[0] + 3 * self._before(middle * STRATUM)
            low, high = (middle, high) if first <= token else (low, middle)
        return low * STRATUM + bisect_right(self._table(low).starts, token) - 1

    def _near(self, token: int) -> tuple[int, int]:
        """Strata low .. high among which the token's is: mostly one, in a few steps.

        A token lies in the source at most as far back as sentinels lie before a later stratum, and
        at least as far as before an earlier one.
        """
        low, high = 0, min(self.documents - 1, self._source.find(token)) // STRATUM
        for _ in range(2):
            least = self._source.find(max(0, token - 3 * self._before(high * STRATUM)))
            low = max(low, min(high, least // STRATUM))
            if low == high:
                break
            most = self._source.find(token - 3 * self._before(low * STRATUM))
            high = min(high, most // STRATUM)
            if low == high:
                break
        return low, high + 1

    def parts(self, document: int) -> list[int | tuple[int, int]]:
        """What it is now: sentinels, and (start, stop) of the source, its eot at last."""
        return self._parts(self._table(document // STRATUM), document % STRATUM)

    def _parts(self, table: "_Table", at: int) -> list[int | tuple[int, int]]:
        start, stop = table.firsts[at], table.firsts[at + 1]
        if not table.turned[at]:
            return [(start, stop)]
        low, high = start + table.low[at], start + table.high[at]
        prefix, middle, suffix = (start, low), (low, high), (high, stop - 1)
        mark, eot = self._marks, (stop - 1, stop)
        if table.psm[at]:
            return [mark.prefix, prefix, mark.suffix, suffix, mark.middle, middle, eot]
        return [mark.prefix, mark.suffix, suffix, mark.middle, prefix, middle, eot]

    def _read_part(self, table: "_Table", place: int, skip: int, out: np.ndarray) -> None:
        """Fills `out` with a document's tokens from `skip` on; reads no others."""
        start, stop = table.firsts[place], table.firsts[place + 1]
        if not table.turned[place]:
            out[:] = self._source.read(start + skip, start + skip + len(out))
        elif 2 * len(out) > stop - start:  # at once: a read costs as much as 1,000 tokens
            whole = self._turn(self._source.read(start, stop), table, place)
            out[:] = whole[skip : skip + len(out)]
        else:
            self._read_parts(self._parts(table, place), skip, out)

    def _turn(self, text: np.ndarray, table: "_Table", place: int) -> np.ndarray:
        low, high = table.low[place], table.high[place]
        prefix, middle, suffix = text[:low], text[low:high], text[high:-1]
        pre, mid, suf = self._mark_tokens
        if table.psm[place]:
            return np.concatenate((pre, prefix, suf, suffix, mid, middle, text[-1:]))
        return np.concatenate((pre, suf, suffix, mid, prefix, middle, text[-1:]))

    def _read_parts(
        self, parts: Sequence[int | tuple[int, int]], skip: int, out: np.ndarray
    ) -> None:
        filled = 0
        for part in parts:
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
        firsts = np.array([bounds[0][0], *(stop for _, stop in bounds)])
        starts = firsts + 3 * (self._before(first) + np.append(0, np.cumsum(turned)))
        draws = hashed(np.arange(3 * size), make_key("cut", self._key, stratum)).reshape(size, 3)
        cuts = np.sort(draws[:, :2] % np.diff(firsts).astype(np.uint64)[:, None], axis=1)
        psm = [draw >= self._least_psm for draw in draws[:, 2].tolist()]
        low, high = cuts.astype(np.int64).T.tolist()
        return _Table(starts.tolist(), firsts.tolist(), turned.tolist(), low, high, psm)


class _Table(NamedTuple):
    """Of one stratum. Lists: single values of numpy's arrays take several times as long."""

    starts: list[int]  # [documents + 1]: where each begins, and the last one ends
    firsts: list[int]  # [documents + 1]: the same in the source
    turned: list[bool]
    low: list[int]  # the cuts of each, from its start
    high: list[int]
    psm: list[bool]  # prefix first


def restored(document: Sequence[int] | np.ndarray, marks: Sentinels) -> np.ndarray:
    """The text of a whole turned document in its own order, without sentinels; others unchanged."""
    tokens = np.asarray(document)
    if not len(tokens) or tokens[0] != marks.prefix:
        return tokens
    suffix = int(np.flatnonzero(tokens == marks.suffix)[0])
    middle = int(np.flatnonzero(tokens == marks.middle)[0])
    parts = tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle], tokens[-1:]
    return np.concatenate(parts)
