"""Tokens of one source on disk or in memory, read by position.

A source is one long row of tokens: eot, then every document followed by eot. Document i is the
tokens [ends[i - 1], ends[i]), its eot included, where ends[-1] is 1.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np

from jaxmoe.errors import UserError

__all__ = ["Row", "Source", "StoredSource"]


_LOST = -1  # a token of a damaged shard that is skipped (damage.py)


class Source(Protocol):
    """What the stream asks of a source; one of 10^9 documents need not lie in memory."""

    name: str
    domain: str  # of all its documents: code, prose, ...

    @property
    def tokens(self) -> int:
        """How many, eots included."""
        ...

    @property
    def documents(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens at 0 <= start <= stop <= tokens."""
        ...

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document's tokens begin and end, its eot included."""
        ...

    def find(self, token: int) -> int:
        """The document that the token at an index is in; -1 for the first eot."""
        ...


class Row:
    """A source's tokens as what can be sliced: int32, read when asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        return self._source.read(start, max(start, stop))[::step]


class StoredSource:
    """A source in shards, which may be memory maps: a read touches the pages that it needs."""

    def __init__(
        self,
        name: str,
        shards: Sequence[np.ndarray],
        ends: np.ndarray | Callable[[], np.ndarray],
        domain: str = "",
        documents: int | None = None,
        ids: int | None = None,
    ) -> None:
        """`shards`: the row of tokens, cut anywhere. `ends`: int64 [documents], ascending; or what
        opens them when they are first needed, and then how many `documents` there are. `ids`: under
        which every token is; looked at in what is read, since a lookup would clip it silently."""
        self._ids = ids
        self.name, self.domain = name, domain
        self._shards = tuple(_plain(shard) for shard in shards)
        self._open_ends = ends if callable(ends) else lambda: ends
        self._documents = len(self._ends) if documents is None else documents
        self._starts = list(accumulate((len(s) for s in self._shards), initial=0))

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def documents(self) -> int:
        return self._documents

    @cached_property
    def _ends(self) -> np.ndarray:
        return _plain(self._open_ends())

    def read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"{self.name}: {start}..{stop} of {self.tokens} tokens")
        shard = bisect_right(self._starts, start) - 1
        out = np.empty(stop - start, np.int32)
        filled = 0
        while filled < len(out):
            here = start + filled - self._starts[shard]
            part = self._shards[shard][here : here + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        if self._ids is not None and len(out) and (out.max() >= self._ids or out.min() < _LOST):
            wrong = int(out.max()) if out.max() >= self._ids else int(out.min())
            raise UserError(
                f"source {self.name!r}: token {wrong} between {start} and {stop}, and its tokenizer"
                f" has {self._ids} ids; build the data set again, or copy it whole"
            )
        return out

    def bounds(self, document: int) -> tuple[int, int]:
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.name}: document {document} of {self.documents}")
        start = int(self._ends[document - 1]) if document else 1
        end = int(self._ends[document])
        if not 0 < start < end <= self.tokens:
            raise UserError(
                f"source {self.name!r}: document {document} is of tokens {start} to {end} of"
                f" {self.tokens}; build the data set again, or copy it whole"
            )
        return start, end

    def find(self, token: int) -> int:
        return int(self._ends.searchsorted(token, "right")) if token else -1


def _plain(array: np.ndarray) -> np.ndarray:
    """A memory map as an array over the same memory: as itself it makes a new map at each index,
    which took half of the time of finding a document."""
    return array.view(np.ndarray) if isinstance(array, np.memmap) else array
