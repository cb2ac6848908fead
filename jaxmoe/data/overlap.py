"""Held-out sets against training sources: which documents repeat held-out text, and how much of it.

A training document leaks a set if it shares more than 1,000 windows of letters with it (200 of
words), or more than 20 % of its own, or of those of one held-out document: then at least 50 (10),
or half of a shorter one.
"""

import heapq
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.data.texts import Decoder, document_texts
from jaxmoe.data.windows import COMMON, Found, Index, Method, build_index, find, hashes, passage
from jaxmoe.errors import UserError

__all__ = ["Limits", "Scan", "scan", "to_drop"]

_RANGE = 1 << 21  # tokens of a task: seconds of work, so that the bar moves
_WORST = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a document leaks."""

    windows: int  # that it shares with a set ...
    share: float  # ... or of its windows, or of a held-out document's
    least: int  # windows of a held-out document, or half of one that has fewer

    @classmethod
    def of(cls, method: Method) -> "Limits":
        """A word has about five letters."""
        windows, least = (1_000, 50) if method == "chars50" else (200, 10)
        return cls(windows=windows, share=0.2, least=least)


@dataclass(kw_only=True)
class Scan:
    """A set against a source."""

    windows: int = 0  # of the source
    hits: int = 0  # of them that are held out
    touched: int = 0  # documents with a hit
    leaking: list[int] = field(default_factory=list)  # documents
    covered: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # places, unique
    worst: list[tuple[int, int]] = field(default_factory=list)  # (hits, document), largest first

    def add(self, other: "Scan") -> None:
        self.windows += other.windows
        self.hits += other.hits
        self.touched += other.touched
        self.leaking += other.leaking
        if other.hits:
            self.covered = np.union1d(self.covered, other.covered)
            self.worst = heapq.nlargest(_WORST, self.worst + other.worst)


@dataclass(frozen=True, kw_only=True)
class _Sets:
    """Held-out sets as they are looked for."""

    names: tuple[str, ...]
    indexes: tuple[Index, ...]
    covered: tuple[np.ndarray, ...]  # [documents] windows of each that are looked for
    decoder: Decoder


def scan(
    data: DataSet,
    sets: Sequence[str],
    sources: Sequence[str],
    *,
    method: Method = "chars50",
    limits: Limits | None = None,
    common: int = COMMON,
    processes: int = 1,
    report: Callable[[str, float], None] = lambda phase, fraction: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Reads every document of the sources once. By set, by source: a row for the manifest, and
    under `drop` the documents that leak.

    Memory: 16 bytes a held-out window, shared by the processes, and some MB each.
    """
    limits = limits or Limits.of(method)
    known = _indexed(data, sets, method, common, report)
    with tempfile.TemporaryDirectory(prefix="jaxmoe-overlap-") as folder:
        found = _scan_all(data, known, sources, method, limits, processes, Path(folder), report)
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in sets}
    for number, name in enumerate(sets):
        for source in sources:
            one = found[source][number]
            row = _row(data, known, number, source, one, method)
            rows[name][source] = {**row, "common": common, "limits": asdict(limits)}
    return rows


def to_drop(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, set[int]]:
    """Documents that leak any of the sets, by source."""
    drop: dict[str, set[int]] = {}
    for by_source in rows.values():
        for source, row in by_source.items():
            if row["drop"]:
                drop.setdefault(source, set()).update(row["drop"])
    return drop


def _indexed(
    data: DataSet,
    sets: Sequence[str],
    method: Method,
    common: int,
    report: Callable[[str, float], None],
) -> _Sets:
    decoder = Decoder(data.tokenizer)
    indexes, covered = [], []
    for name in sets:
        source = data.heldout[name]
        each = []
        for first, texts in document_texts(source, 0, source.documents, decoder):
            each += [hashes(text, method) for text in texts]
            report(f"index {name}", (first + len(texts)) / source.documents)
        index, windows = build_index(each, common)
        indexes.append(index)
        covered.append(windows)
    return _Sets(names=tuple(sets), indexes=tuple(indexes), covered=tuple(covered), decoder=decoder)


def _scan_all(
    data: DataSet,
    known: _Sets,
    sources: Sequence[str],
    method: Method,
    limits: Limits,
    processes: int,
    folder: Path,
    report: Callable[[str, float], None],
) -> dict[str, list[Scan]]:
    found = {source: [Scan() for _ in known.names] for source in sources}
    tasks = [(s, a, b) for s in sources for a, b in _ranges(data, s)]
    total = sum(data.sources[s].tokens - 1 for s in sources)
    done = 0
    worker = _Worker(data, known, method, limits)
    with _mapped(worker, processes if len(tasks) > 1 else 1, folder) as run:
        for (source, start, stop), scans in zip(tasks, run(tasks), strict=True):
            for all_of_it, part in zip(found[source], scans, strict=True):
                all_of_it.add(part)
            row = data.sources[source]
            done += row.bounds(stop - 1)[1] - row.bounds(start)[0]
            report("compare", done / total)
    return found


def _ranges(data: DataSet, source: str) -> Iterator[tuple[int, int]]:
    """Documents start..stop of about 2 M tokens."""
    row = data.sources[source]
    start = 0
    while start < row.documents:
        token = row.bounds(start)[0] + _RANGE
        stop = row.documents if token >= row.tokens else max(start + 1, row.find(token))
        yield start, stop
        start = stop


class _Worker:
    """What a process needs to scan ranges of documents."""

    def __init__(self, data: DataSet, known: _Sets, method: Method, limits: Limits) -> None:
        self.data, self.known, self.limits = data, known, limits
        self.method: Method = method
        # Windows by the document that they are counted for: the first that has them.
        self._own = [
            np.bincount(i.owners, minlength=len(c))
            for i, c in zip(known.indexes, known.covered, strict=True)
        ]

    def __call__(self, task: tuple[str, int, int]) -> list[Scan]:
        source, start, stop = task
        scans = [Scan() for _ in self.known.names]
        row = self.data.sources[source]
        for first, texts in document_texts(row, start, stop, self.known.decoder):
            each = find(texts, self.known.indexes, self.method)
            for number, (scan, found) in enumerate(zip(scans, each, strict=True)):
                scan.add(self._one(number, first, found))
        return scans

    def _one(self, number: int, first: int, found: Found) -> Scan:
        scan = Scan(windows=int(found.windows.sum()), hits=len(found.place))
        if not scan.hits:
            return scan
        scan.covered = found.place  # made unique where scans are added
        documents, begins, counts = np.unique(found.document, return_index=True, return_counts=True)
        scan.touched = len(documents)
        for document, begin, count in zip(documents, begins, counts, strict=True):
            places = found.place[begin : begin + count]
            if self._leaks(number, int(count), int(found.windows[document]), places):
                scan.leaking.append(first + int(document))
        pairs = zip(counts.tolist(), (first + documents).tolist(), strict=True)
        scan.worst = heapq.nlargest(_WORST, pairs)
        return scan

    def _leaks(self, number: int, hits: int, windows: int, places: np.ndarray) -> bool:
        limits = self.limits
        if hits > min(limits.windows, limits.share * windows):
            return True
        owners = self.known.indexes[number].owners[np.unique(places)]
        whose, counts = np.unique(owners, return_counts=True)
        own = self._own[number][whose]
        enough = (counts > limits.share * own) & (2 * counts >= np.minimum(2 * limits.least, own))
        return bool(enough.any())


_worker: _Worker | None = None  # of a process of the pool


class _mapped:
    """`run(tasks)` yields results in order, from this process or from a pool of others."""

    def __init__(self, worker: _Worker, processes: int, folder: Path) -> None:
        self._worker, self._folder = worker, folder
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            known = worker.known
            for number, index in enumerate(known.indexes):
                (folder / str(number)).mkdir()
                index.save(folder / str(number))
            # Started anew: a fork would copy the progress bar's thread's locks.
            self._pool = ProcessPoolExecutor(
                processes,
                multiprocessing.get_context("spawn"),
                _start,
                (worker.data.folder, folder, known.names, known.covered)
                + (worker.method, worker.limits),
            )

    def __enter__(self) -> Callable[..., Iterator[list[Scan]]]:
        if self._pool is None:
            return lambda tasks: map(self._worker, tasks)
        pool = self._pool
        return lambda tasks: pool.map(_run, tasks)

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start(
    folder: Path,
    indexes: Path,
    names: tuple[str, ...],
    covered: tuple[np.ndarray, ...],
    method: Method,
    limits: Limits,
) -> None:
    global _worker
    os.nice(5)  # whoever waits for it works on something else meanwhile
    opened = tuple(Index.open(indexes / str(n)) for n in range(len(names)))
    data = open_data_set(folder)
    decoder = Decoder(data.tokenizer)
    known = _Sets(names=names, indexes=opened, covered=covered, decoder=decoder)
    _worker = _Worker(data, known, method, limits)


def _run(task: tuple[str, int, int]) -> list[Scan]:
    assert _worker is not None
    return _worker(task)


def _row(
    data: DataSet, known: _Sets, number: int, source: str, one: Scan, method: Method
) -> dict[str, Any]:
    index, covered = known.indexes[number], known.covered[number]
    sizes = data.names[source]
    return {
        "method": method,
        "documents": data.sources[source].documents,
        "windows": one.windows,
        "hits": one.hits,
        "touched": one.touched,
        "leaking": len(one.leaking),
        "leaking_bytes": sum(sizes[n].bytes for n in one.leaking),
        "heldout_windows": len(index),
        "heldout_covered": len(one.covered),
        "heldout_unchecked": int(np.count_nonzero(covered == 0)),
        "worst": [_example(data, known, number, source, pair, method) for pair in one.worst],
        "drop": sorted(one.leaking),
    }


def _example(
    data: DataSet, known: _Sets, number: int, source: str, pair: tuple[int, int], method: Method
) -> dict[str, Any]:
    """What a document shares, as a person wants to see it."""
    hits, document = pair
    row, about = data.sources[source], data.names[source][document]
    begin, end = row.bounds(document)
    text = known.decoder.text(row.read(begin, end - 1))
    index = known.indexes[number]
    found = find([text], [index], method)[0]
    if len(found.place) != hits:
        raise UserError(f"{data.folder}: {source} changed while it was read; run it again")
    owners = index.owners[found.place]
    whose = int(np.bincount(owners).argmax())
    shown = int(found.window[np.flatnonzero(owners == whose)[0]])
    held = data.heldout_names[known.names[number]][whose]
    return {
        "document": document,
        "package": about.package,
        "name": about.name,
        "windows": int(found.windows[0]),
        "hits": hits,
        "of": held.name,
        "passage": passage(text, method, shown),
    }
