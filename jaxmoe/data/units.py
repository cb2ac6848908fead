"""Units of work of a build: some pieces, read and encoded into two files by any process.

    KEY.bin   ids of the unit's documents, without eots; KEY names the input, settings and stamps
    KEY.json  a row a document, what was left out and why; written last, so that it means: done

A unit is a pure function of its pieces and the settings, so that a build may be killed at any time
and goes on with the units that are done.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.data import duplicates
from jaxmoe.data.dataset import digest
from jaxmoe.data.pieces import Piece
from jaxmoe.data.readers import Fault, Text, read_piece, record_count, row_groups, unpack
from jaxmoe.data.tokenizer import Tokenizer

__all__ = ["Encoder", "Unit", "cut", "done", "expand", "start_worker", "work", "work_unpack"]

# Raise it with any change to what documents are made of the same pieces.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What a unit depends on besides its pieces."""

    tokenizer: str  # path of a tokenizer.json
    fingerprint: str
    near: bool  # whether signatures for near-duplicates are wanted


@dataclass(frozen=True, kw_only=True)
class Unit:
    pieces: tuple[Piece, ...]
    key: str
    size: int  # bytes of input


def cut(pieces: Iterable[Piece], encoder: Encoder, size: int) -> Iterator[Unit]:
    """Consecutive pieces of about `size` bytes together."""
    some: list[Piece] = []
    total = 0
    for piece in pieces:
        some.append(piece)
        total += piece.size
        if total >= size:
            yield _unit(some, encoder, total)
            some, total = [], 0
    if some:
        yield _unit(some, encoder, total)


def expand(pieces: Iterable[Piece], plain: Mapping[str, Path], size: int) -> Iterator[Piece]:
    """Large files of records in parts of about `size` bytes; `plain` has what was unpacked."""
    for piece in pieces:
        if piece.kind == "lines":
            path = plain.get(piece.path, Path(piece.path))
            end = path.stat().st_size
            for start in range(0, max(end, 1), size):
                yield replace(
                    piece, path=str(path), start=start, stop=min(end, start + size), size=size
                )
        elif piece.kind == "parquet":
            yield from _row_groups(piece)
        elif piece.kind == "records":
            yield from _record_ranges(piece, size)
        else:
            yield piece


def done(folder: Path, unit: Unit) -> bool:
    """Whether both of its files are there, whole."""
    try:
        meta = folder / f"{unit.key}.json"
        return meta.is_file() and (folder / f"{unit.key}.bin").stat().st_size == read(meta)["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def read(meta: Path) -> dict[str, Any]:
    return json.loads(meta.read_text())


def start_worker(parent: int) -> None:
    """In a new process: one thread a worker, and no life beyond the builder's."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # of `tokenizers`, which reads it once
    gc.disable()  # parsing makes trees of a million nodes, none of them in a circle
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def work(unit: Unit, folder: str, encoder: Encoder) -> str:
    """Reads and encodes; the files appear whole. The unit's key."""
    tokenizer = _tokenizer(encoder.tokenizer)
    texts: list[Text] = []
    faults: list[dict[str, Any]] = []
    for piece in unit.pieces:
        for record in read_piece(piece):
            if isinstance(record, Fault):
                faults.append(dataclasses.asdict(record))
            else:
                texts.append(record)
    encoded = tokenizer.encode_batch([t.data.decode() for t in texts])
    rows = [
        [t.source, t.package, t.name, len(t.data), hashlib.sha256(t.data).hexdigest(), len(ids)]
        for t, ids in zip(texts, encoded, strict=True)
    ]
    flat = np.concatenate([np.empty(0, tokenizer.dtype), *encoded]).astype(tokenizer.dtype)
    parts = [flat.tobytes()]
    if encoder.near:
        parts.append(duplicates.signatures(encoded).tobytes())
    meta = {"documents": rows, "faults": faults, "bytes": sum(map(len, parts))}
    _write(Path(folder, f"{unit.key}.bin"), parts)
    _write(Path(folder, f"{unit.key}.json"), [json.dumps(meta).encode()])
    return unit.key


def work_unpack(path: str, to: str) -> str | None:
    """The plain file of a packed one, whole, and beside it why it ends early, if it does."""
    unfinished = Path(f"{to}.tmp-{os.getpid()}")
    fault = unpack(Path(path), unfinished)
    _write(Path(f"{to}.fault"), [json.dumps(fault).encode()])
    os.replace(unfinished, to)
    return fault


def _row_groups(piece: Piece) -> Iterator[Piece]:
    groups = row_groups(piece)
    if not groups:  # unreadable: one piece, whose reader says so
        yield piece
    for number, size in enumerate(groups):
        yield replace(piece, start=number, stop=number + 1, size=size)


def _record_ranges(piece: Piece, size: int) -> Iterator[Piece]:
    count = record_count(piece)
    if not count:
        yield piece
        return
    step = max(1, count * size // max(piece.size, 1))
    for start in range(0, count, step):
        yield replace(piece, start=start, stop=min(count, start + step), size=size)


def _unit(pieces: Sequence[Piece], encoder: Encoder, size: int) -> Unit:
    about = [dataclasses.asdict(p) for p in pieces]
    key = digest({"version": VERSION, "pieces": about, **dataclasses.asdict(encoder)})
    return Unit(pieces=tuple(pieces), key=key, size=size)


_loaded: dict[str, Tokenizer] = {}


def _tokenizer(path: str) -> Tokenizer:
    if path not in _loaded:
        _loaded[path] = Tokenizer(Path(path).read_text())
        _loaded[path].threads = 1
    return _loaded[path]


def _write(path: Path, parts: Iterable[bytes]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(unfinished, "wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)


def _follow(parent: int) -> None:
    """A killed builder cannot stop its workers, and they would wait for ever."""
    with contextlib.suppress(KeyboardInterrupt):
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
