"""Which tokens of a source lie in which sequence, so that any one is found without the others.

An epoch of a source is cut into windows, which are shuffled by a computed permutation; behind one
another they are the source's row, of which the stream takes sequence after sequence. A window is
one sequence of the greatest length (split), or as many as ROWS of them, between which its documents
are arranged (best_fit). Nothing is padded and nothing is left out but the last tokens of a source,
fewer than one sequence.

Windows of whole documents would have unequal lengths, and an index of them would grow with the
source; equal ones cut two documents each, and need none.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import gcd
from typing import Literal, NamedTuple

import numpy as np

from jaxmoe.data.shuffle import Permutation, make_key
from jaxmoe.data.store import Source

__all__ = ["Packer", "Span", "pack"]

ROWS = 256  # of a window of best_fit: its borders cut one document in so many sequences
# Arrangements that are kept: of as many windows as two of the stream's blocks (mixture.py) are made
# of. 10 kB each at 1,024 tokens a document and a sequence.
_PACKED = 600


class Span(NamedTuple):
    """Consecutive tokens start .. stop of a source, as it is in one epoch."""

    epoch: int
    start: int
    stop: int


class Packer:
    """The row of one source: epoch after epoch, each shuffled anew.

    Attributes:
        epoch: tokens of an epoch. Its last tokens that fill no sequence are left out, and the very
            last is never an input, since nothing follows it.
        window: tokens of a window.
    """

    def __init__(
        self,
        view: Callable[[int], Source],
        lengths: Sequence[int],
        kind: Literal["split", "best_fit"],
        key: int,
    ) -> None:
        """`view(epoch)`: the source as that epoch reads it, always of the same number of tokens.
        `lengths`: all that will be asked for; with best_fit each divides the greatest."""
        self._view, self._kind, self._key = view, kind, key
        longest = max(lengths)
        tokens = max(0, view(0).tokens - 1)
        if kind == "split":
            unit, self.window = gcd(*lengths), longest
        else:
            assert not any(longest % length for length in lengths), lengths
            # Where the length changes, what is left of a window is left out: a 64th of an epoch.
            several = max(1, tokens // longest // 64) if len(set(lengths)) > 1 else ROWS
            unit, self.window = longest, longest * min(ROWS, several)
        self.epoch = tokens // unit * unit if tokens >= longest else 0
        self._order = lru_cache(maxsize=4)(self._make_order)
        self._packed = lru_cache(maxsize=_PACKED)(self._pack)

    def spans(self, at: int, length: int) -> list[Span]:
        """What the tokens at .. at + length of the row are, in their order."""
        found: list[Span] = []
        while length:
            epoch, place = divmod(at, self.epoch)
            start, stop, offset = self._find(epoch, place)
            if self._kind == "best_fit":
                assert offset % length == 0, "best_fit: a sequence begins in the middle of another"
                return self._row(epoch, start, stop, length, offset // length)
            taken = min(length, stop - start - offset)
            span = Span(epoch, start + offset, start + offset + taken)
            if found and found[-1].epoch == epoch and found[-1].stop == span.start:
                span = Span(epoch, found.pop().start, span.stop)
            found.append(span)
            at, length = at + taken, length - taken
        return found

    def next_start(self, at: int) -> int:
        """Where sequences of another length may begin: with best_fit at the next window."""
        if self._kind == "split":
            return at
        epoch, place = divmod(at, self.epoch)
        return epoch * self.epoch + min(self.epoch, -(-place // self.window) * self.window)

    def _find(self, epoch: int, place: int) -> tuple[int, int, int]:
        """(first token of its window, end of the window, how far into it) of a place in an epoch.

        The last window of a source may be short: it stays the last of every epoch."""
        whole = self.epoch // self.window
        number, offset = divmod(place, self.window)
        if number < whole:
            number = self._order(epoch).at(number)
        start = number * self.window
        return start, min(start + self.window, self.epoch), offset

    def _make_order(self, epoch: int) -> Permutation:
        return Permutation(self.epoch // self.window, make_key("windows", self._key, epoch))

    def _row(self, epoch: int, start: int, stop: int, length: int, number: int) -> list[Span]:
        """Of the window start .. stop as best_fit has it."""
        parts, firsts = self._packed(epoch, start, stop, length)
        row = parts[firsts[number] : firsts[number + 1]].tolist()
        return [Span(epoch, start + first, start + last) for first, last in row]

    def _pack(
        self, epoch: int, start: int, stop: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32: [parts, 2], start and end in the window, row after row; each row's first part."""
        rows = pack(_documents(self._view(epoch), start, stop), length)
        parts = np.array([part for row in rows for part in row], np.int64) - start
        firsts = np.cumsum([0, *map(len, rows)])
        return parts.astype(np.int32), firsts.astype(np.int32)


def pack(pieces: Sequence[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    """Sequences of exactly `length` tokens out of all `pieces` (start, stop), longest piece first
    into the smallest gap that holds it (best-fit decreasing; Ding et al., arXiv:2404.10830).

    What is longer than a sequence fills whole ones, and its end is a piece like others. As many
    sequences are filled as there are tokens for, so what fits nowhere is cut, into the largest gap.
    """
    total = sum(stop - start for start, stop in pieces)
    assert total % length == 0, (total, length)
    rows: list[list[tuple[int, int]]] = []
    rest: list[tuple[int, int]] = []
    for start, stop in pieces:
        while stop - start >= length:
            rows.append([(start, start + length)])
            start += length
        if start < stop:
            rest.append((start, stop))
    gaps: list[tuple[int, int]] = []  # (tokens, row), ascending
    for start, stop in sorted(rest, key=lambda piece: (piece[0] - piece[1], piece[0])):
        while start < stop:
            at = bisect_left(gaps, (stop - start, 0))
            if at == len(gaps) and len(rows) < total // length:
                rows.append([])
                gap, row = length, len(rows) - 1
            else:
                gap, row = gaps.pop(min(at, len(gaps) - 1))
            taken = min(gap, stop - start)
            rows[row].append((start, start + taken))
            start += taken
            if gap > taken:
                insort(gaps, (gap - taken, row))
    return rows


def _documents(source: Source, start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of start .. stop that are of different documents."""
    pieces: list[tuple[int, int]] = []
    document = source.find(start)
    while start < stop:
        end = min(stop, source.bounds(document)[1] if document >= 0 else 1)
        if end > start:
            pieces.append((start, end))
        start, document = end, document + 1
    return pieces
