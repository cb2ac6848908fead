"""Builds a data set of format 2: lists, encodes in units on all cores, then merges in order.

    OUT            appears whole, by a rename
    OUT.partial/   plain/ what was unpacked, units/ what is encoded, out/ the merge; kept by a kill
    OUT.lock       held by the process that builds

The same input and settings give the same bytes, whatever the workers, and however often killed.
"""

import contextlib
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxmoe.data import duplicates, pieces, units
from jaxmoe.data.dataset import (
    MANIFEST,
    SHARD_BYTES,
    DataSet,
    SourceWriter,
    digest,
    new_manifest,
    open_data_set,
    write_manifest,
    write_tokenizer,
)
from jaxmoe.data.pieces import Input, Listed, Piece
from jaxmoe.data.recipes import list_recipe
from jaxmoe.data.tokenizer import Tokenizer
from jaxmoe.errors import UserError

__all__ = ["Plan", "build", "listing"]

Report = Callable[[str, float], None]  # (phase, fraction of it that is done)
UNIT_BYTES = 16_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a data set is made of; the same plan over the same files gives the same bytes."""

    inputs: Sequence[Input] = ()
    tiers: Sequence[str] = ()
    near_duplicates: bool = False
    max_malformed: float = 0.01  # of a source's records
    shard_bytes: int = SHARD_BYTES


@dataclass(kw_only=True)
class _Tally:
    """What became of one source's records."""

    dropped: Counter[str]
    malformed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fault(self, row: Mapping[str, Any]) -> None:
        if not row["malformed"]:
            self.dropped[row["reason"]] += 1
            return
        about = self.malformed.setdefault(row["reason"], {"n": 0, "example": row["name"]})
        about["n"] += 1


def build(
    plan: Plan,
    tokenizer: Tokenizer,
    out: Path,
    cache: Path,
    *,
    workers: int | None = None,
    report: Report | None = None,
    unit_bytes: int = UNIT_BYTES,
    force: bool = False,
) -> DataSet:
    """The data set of `plan` in `out`; opened, if it is there already, of the same plan and files.

    `cache` keeps fetched packages; `workers` None is a process a core, 1 is none but this one.

    Raises:
        UserError: nothing to read, too much of it malformed, or `out` holds something else.
    """
    report = report or (lambda phase, done: None)
    out = out.expanduser().absolute()
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        report("list", 0.0)
        listed = listing(plan, cache, partial / "plain")
        report("list", 1.0)
        inputs = _inputs_digest(listed, plan)
        if out.exists() and not force:
            return _again(out, tokenizer, inputs)
        with _pool(workers) as run:
            encoder, done = _encode(plan, tokenizer, listed, partial, run, report, unit_bytes)
            unfinished = partial / "out"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _merge(plan, tokenizer, listed, partial, done, unfinished, inputs, report)
        if out.exists():
            shutil.rmtree(out)
        os.replace(unfinished, out)
        shutil.rmtree(partial)
    return open_data_set(out)


def listing(plan: Plan, cache: Path, scratch: Path) -> Listed:
    """Every piece of the plan's tiers and inputs, in order."""
    listed = Listed()
    for tier in plan.tiers:
        listed.add(list_recipe(tier, cache, scratch))
    for given in plan.inputs:
        listed.add(pieces.list_input(given))
    if not listed.pieces:
        raise UserError("nothing to build from: give --source NAME=WHERE or --tier small")
    return listed


def _encode(
    plan: Plan,
    tokenizer: Tokenizer,
    listed: Listed,
    partial: Path,
    run: "_Run",
    report: Report,
    unit_bytes: int,
) -> tuple[units.Encoder, list[units.Unit]]:
    """Does what units are not yet done; all of them, in order."""
    for name in ("plain", "units"):
        (partial / name).mkdir(parents=True, exist_ok=True)
    plain, faults = _unpacked(listed.pieces, partial / "plain", run, report)
    saved = partial / "tokenizer.json"
    saved.write_text(tokenizer.json)
    encoder = units.Encoder(
        tokenizer=str(saved), fingerprint=tokenizer.fingerprint, near=plan.near_duplicates
    )
    expanded = units.expand(listed.pieces, plain, unit_bytes)
    every = list(units.cut(expanded, encoder, unit_bytes))
    folder = partial / "units"
    left = [u for u in every if not units.done(folder, u)]
    total = max(1, sum(u.size for u in every))
    ready = total - sum(u.size for u in left)
    sizes = {u.key: u.size for u in left}
    report("encode", ready / total)
    for key in run(units.work, [(u, str(folder), encoder) for u in left]):
        ready += sizes[key]
        report("encode", ready / total)
    for piece, fault in faults:
        tally = {"source": piece.source, "name": piece.name, "reason": fault, "malformed": True}
        listed.sources[piece.source].setdefault("_faults", []).append(tally)
    return encoder, every


def _unpacked(
    every: Iterable[Piece], folder: Path, run: "_Run", report: Report
) -> tuple[dict[str, Path], list[tuple[Piece, str]]]:
    """Packed files of lines as plain ones, which can be read from anywhere; and which were cut."""
    packed = [p for p in every if pieces.packed(p)]
    plain = {p.path: folder / digest([p.path, p.size, p.stamp]) for p in packed}
    left = [(p.path, str(plain[p.path])) for p in packed if not plain[p.path].exists()]
    for number, _ in enumerate(run(units.work_unpack, left), 1):
        report("unpack", number / len(left))
    faults: list[tuple[Piece, str]] = []
    for piece in packed:
        fault = json.loads(Path(f"{plain[piece.path]}.fault").read_text())
        if fault:
            faults.append((piece, fault))
    return plain, faults


def _merge(
    plan: Plan,
    tokenizer: Tokenizer,
    listed: Listed,
    partial: Path,
    done: Sequence[units.Unit],
    out: Path,
    inputs: str,
    report: Report,
) -> None:
    """One row of tokens a source, of the units in order, without what came before."""
    tallies = {n: _Tally(dropped=Counter(c)) for n, c in listed.dropped.items()}
    for name, about in listed.sources.items():
        for row in about.pop("_faults", ()):
            tallies[name].fault(row)
    writers = {n: SourceWriter(out, n, tokenizer, plan.shard_bytes) for n in listed.sources}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        _merge_units(plan, tokenizer, partial / "units", done, writers, tallies, report)
        _finish(plan, tokenizer, listed, out, writers, tallies, inputs)


def _merge_units(
    plan: Plan,
    tokenizer: Tokenizer,
    folder: Path,
    done: Sequence[units.Unit],
    writers: Mapping[str, SourceWriter],
    tallies: Mapping[str, _Tally],
    report: Report,
) -> None:
    kept: Counter[str] = Counter()
    seen: set[bytes] = set()
    near = duplicates.Near() if plan.near_duplicates else None
    for number, unit in enumerate(done):
        meta = units.read(folder / f"{unit.key}.json")
        for row in meta["faults"]:
            tallies[row["source"]].fault(row)
        _merge_unit(folder / f"{unit.key}.bin", meta, tokenizer, writers, tallies, seen, near)
        kept.update(row[0] for row in meta["documents"])
        report("write", (number + 1) / len(done))
    _check_malformed(plan, tallies, kept)


def _finish(
    plan: Plan,
    tokenizer: Tokenizer,
    listed: Listed,
    out: Path,
    writers: Mapping[str, SourceWriter],
    tallies: Mapping[str, _Tally],
    inputs: str,
) -> None:
    entries: dict[str, Any] = {}
    files = write_tokenizer(out, tokenizer)
    for name, writer in writers.items():
        tally = tallies[name]
        entries[name], rows = writer.close(
            **listed.sources[name],
            dropped=dict(sorted(tally.dropped.items())),
            malformed=dict(sorted(tally.malformed.items())),
        )
        files |= rows
        if not entries[name]["documents"]:
            why = ", ".join(f"{n} {r}" for r, n in tally.dropped.items()) or "no record in it"
            raise UserError(f"source {name}: no document is left ({why})")
    settings = {"near_duplicates": plan.near_duplicates, "max_malformed": plan.max_malformed}
    write_manifest(
        out, new_manifest(tokenizer, entries, files, settings={**settings, "inputs": inputs})
    )


def _merge_unit(
    path: Path,
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
    writers: Mapping[str, SourceWriter],
    tallies: Mapping[str, _Tally],
    seen: set[bytes],
    near: duplicates.Near | None,
) -> None:
    rows = meta["documents"]
    tokens = np.fromfile(path, tokenizer.dtype, sum(row[5] for row in rows))
    signatures = None
    if near:
        signatures = np.fromfile(path, np.uint32, offset=tokens.nbytes)
        signatures = signatures.reshape(len(rows), duplicates.PERMUTATIONS)
    at = 0
    for number, (source, package, name, size, sha256, count) in enumerate(rows):
        ids = tokens[at : at + count]
        at += count
        raw = bytes.fromhex(sha256)
        if raw in seen:
            tallies[source].dropped["identical to another"] += 1
            continue
        seen.add(raw)
        if near and signatures is not None and not near.is_new(signatures[number]):
            tallies[source].dropped["nearly identical to another"] += 1
            continue
        writers[source].add_tokens(package, name, size, raw, ids)


def _check_malformed(plan: Plan, tallies: Mapping[str, _Tally], kept: Counter[str]) -> None:
    for name, tally in tallies.items():
        bad = sum(row["n"] for row in tally.malformed.values())
        records = bad + kept[name]
        if records and bad > plan.max_malformed * records:
            share = math.ceil(1000 * bad / records) / 1000
            reason, worst = max(tally.malformed.items(), key=lambda item: item[1]["n"])
            raise UserError(
                f"source {name}: {bad} of {records} records are malformed, the most {reason} "
                f"({worst['example']}); mend them, or --max-malformed {share:g} and more"
            )


def _inputs_digest(listed: Listed, plan: Plan) -> str:
    """Of what decides the bytes but the tokenizer; times of files are not in it."""
    rows = [[p.source, p.package, p.name, p.size, p.extract, p.text, p.id] for p in listed.pieces]
    splits = any(p.split for p in listed.pieces)
    return digest(
        {
            "version": units.VERSION,
            "pieces": rows,
            "sources": listed.sources,
            "near_duplicates": plan.near_duplicates,
            "shard_bytes": plan.shard_bytes,
            # What parses, and so what has docstrings, is the running Python's.
            "python": platform.python_version_tuple()[:2] if splits else None,
        }
    )


def _again(out: Path, tokenizer: Tokenizer, inputs: str) -> DataSet:
    if not (out / MANIFEST).exists():
        raise UserError(f"--out {out}: it exists and is no data set; give another folder")
    data = open_data_set(out)
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--out {out} was built with another tokenizer; another folder, or --force")
    if data.manifest.get("settings", {}).get("inputs") != inputs:
        raise UserError(
            f"--out {out} was built from other files or settings; another folder, or --force"
        )
    return data


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{out}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"--out {out}: another process is building it") from None
    try:
        yield
    finally:
        lock.release()


_Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]


@contextlib.contextmanager
def _pool(workers: int | None) -> Iterator[_Run]:
    """Runs a function on many arguments; results as they come."""
    count = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers
    count = count or os.cpu_count() or 1
    if count == 1:
        yield lambda function, calls: (function(*call) for call in calls)
        return
    pool = ProcessPoolExecutor(
        count, get_context("spawn"), initializer=units.start_worker, initargs=(os.getpid(),)
    )

    def run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        waiting: list[Future[Any]] = [pool.submit(function, *call) for call in calls]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker died, most likely for want of memory: --workers with fewer goes on "
                "where this build stopped"
            ) from None

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
