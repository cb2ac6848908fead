"""A data set of format 2: a folder of named sources under one tokenizer, read through memory maps.

    manifest.json     format, tokenizer, files, sources, heldout, overlap; written last
    tokenizer.json    the whole tokenizer
    code-00000.bin    tokens of source `code`, little-endian: eot, then every document and its eot
    code-00001.bin    ... the same row goes on: shards are cut anywhere
    code.ends.bin     int64: the index in the row after each document's eot
    code.names.jsonl  a line a document: ["package", "name", bytes of its UTF-8 text]

Held-out sets are sources too, kept under `heldout` in the manifest, in files heldout.NAME-00000.bin
and so on. Writing and reading:

    writer = SourceWriter(folder, "code", tokenizer)
    for package, name, text in documents:
        ids = tokenizer.encode_batch([text])[0]
        writer.add(package, name, text.encode(), ids)
    entry, files = writer.close(domain="code")
    write_tokenizer(folder, tokenizer)  # -> its row of `files`
    write_manifest(folder, new_manifest(tokenizer, {"code": entry}, files))

    data = open_data_set(folder)
    data.sources["code"].read(0, 1024)  # int32 [1024]
    data.names["code"][7]  # DocumentName(package=..., name=..., bytes=...)
    data.tokenizer.decode(data.sources["code"].read(*data.sources["code"].bounds(7)))
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmoe.data.store import StoredSource
from jaxmoe.data.tokenizer import Tokenizer
from jaxmoe.errors import UserError
from jaxmoe.outside import loads, needed, plain_name, reading

__all__ = [
    "FORMAT",
    "MANIFEST",
    "DataSet",
    "DocumentName",
    "Names",
    "SourceWriter",
    "check_name",
    "digest",
    "new_manifest",
    "open_data_set",
    "read_manifest",
    "sync_folder",
    "write_file",
    "write_manifest",
    "write_tokenizer",
]

FORMAT = 2
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 30
OpenShard = Callable[[Path, np.dtype, Mapping[str, Any]], Any]
Fetch = Callable[[Path], None]
MEND = "build the data set again, or copy it whole"
_DTYPES = ("<u2", "<u4")
# What an entry of a source must have, and one of a held-out set besides.
_ENTRY: dict[str, Any] = {
    **{"tokens": int, "documents": int, "bytes": int, "shards": list},
    **{"ends": str, "names": str, "domain": str, "fingerprint": str},
}
_PARTS: dict[str, dict[str, Any]] = {"sources": {}, "heldout": {"text_fingerprint": str}}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # no dot: file names add parts after one


@dataclass(frozen=True)
class DocumentName:
    """Where a document came from."""

    package: str
    name: str
    bytes: int  # of its UTF-8 text


class Names:
    """The names of one source's documents; the file is mapped when the first is asked for."""

    def __init__(self, path: Path, documents: int, fetch: Fetch) -> None:
        self._path, self._documents, self._fetch = path, documents, fetch
        self._raw: np.ndarray | None = None
        self._lines = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._documents

    def __getitem__(self, document: int) -> DocumentName:
        if not 0 <= document < self._documents:
            raise IndexError(f"{self._path.name}: document {document} of {self._documents}")
        if self._raw is None:
            self._fetch(self._path)
            with reading(self._path, MEND):
                raw = np.memmap(self._path, np.uint8, mode="r")
            self._lines = np.concatenate([[0], np.flatnonzero(raw == ord("\n")) + 1])
            self._raw = raw
        if len(self._lines) != self._documents + 1:
            raise UserError(f"{self._path}: {len(self._lines) - 1} lines, {self._documents} named")
        line = self._raw[self._lines[document] : self._lines[document + 1]]
        with reading(f"{self._path}, line {document + 1}", MEND):
            package, name, size = loads(line.tobytes())
            return DocumentName(str(package), str(name), int(size))


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """Losses are only comparable between runs whose training `fingerprint` is the same."""

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    sources: Mapping[str, StoredSource]
    heldout: Mapping[str, StoredSource]
    names: Mapping[str, Names]  # by source
    heldout_names: Mapping[str, Names]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the tokenizer and of every training source; held-out sets not in it."""
        return fingerprint(self.manifest)


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Of what is trained on: the tokenizer, and each source's files."""
    sources = {name: entry["fingerprint"] for name, entry in manifest["sources"].items()}
    return digest({"tokenizer": manifest["tokenizer"]["fingerprint"], "sources": sources})


def digest(tree: Any) -> str:
    """16 hex digits of a JSON tree."""
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_name(name: str) -> None:
    """Raises UserError unless `name` can name a source and its files."""
    if not _NAME.fullmatch(name):
        raise UserError(f"source {name!r}: a name has 1 to 64 of A-Z a-z 0-9 _ -, no _ or - first")


def open_data_set(
    folder: str | Path,
    *,
    verify: bool = False,
    open_shard: OpenShard | None = None,
    fetch: Fetch | None = None,
) -> DataSet:
    """The data set in `folder`.

    Args:
        verify: read every file and compare SHA-256 sums.
        open_shard: how a training shard is opened, of its path, dtype and row of `files`; its size
            is then not compared here. None: as a memory map.
        fetch: called with a file before it is first opened: ends and names of training sources
            when they are needed, and are not compared here; the others now.

    Raises:
        UserError: it is not whole, or of another format; the message names the file and the mend.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    files = manifest["files"]
    trained = manifest["sources"].values()
    late = {s for e in trained for s in e["shards"]} if open_shard else set()
    if fetch:
        late |= {e[part] for e in trained for part in ("ends", "names")}
    for name, expected in files.items():
        if name not in late:
            if fetch:
                fetch(folder / name)
            _check(folder, name, expected, verify)
    with reading(folder / "tokenizer.json", MEND):
        tokenizer = Tokenizer((folder / "tokenizer.json").read_text())
    with reading(folder / MANIFEST, MEND):
        own = open_shard or _map
        how = {"sources": own, "heldout": _map}
        bring = fetch or (lambda path: None)
        opened = [_open(folder, manifest, part, tokenizer, how[part], bring) for part in how]
    return DataSet(
        folder=folder,
        manifest=manifest,
        tokenizer=tokenizer,
        sources=opened[0][0],
        heldout=opened[1][0],
        names=opened[0][1],
        heldout_names=opened[1][1],
    )


class SourceWriter:
    """Writes one source's files; `stem` begins their names (NAME, or heldout.NAME)."""

    def __init__(
        self, folder: Path, stem: str, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder, self._stem, self._dtype = folder, stem, tokenizer.dtype
        self._shard_bytes = max(1, shard_bytes // self._dtype.itemsize) * self._dtype.itemsize
        self._eot = np.array([tokenizer.eot], self._dtype)
        self._files: dict[str, dict[str, Any]] = {}
        self._shards: list[str] = []
        self._shard: _File | None = None
        self._ends = _File(folder / f"{stem}.ends.bin")
        self._names = _File(folder / f"{stem}.names.jsonl")
        self._texts = hashlib.sha256()
        self._tokens = self._documents = self._bytes = 0
        self._write(self._eot)

    def add(self, package: str, name: str, data: bytes, ids: np.ndarray) -> None:
        """One document: its UTF-8 text and its ids, without an eot."""
        self.add_tokens(package, name, len(data), hashlib.sha256(data).digest(), ids)

    def add_tokens(
        self, package: str, name: str, size: int, sha256: bytes, ids: np.ndarray
    ) -> None:
        """The same, of a text whose size in bytes and SHA-256 are known."""
        self._write(ids)
        self._write(self._eot)
        self._ends.write(np.int64(self._tokens).astype("<i8").tobytes())
        self._names.write((json.dumps([package, name, size]) + "\n").encode())
        self._texts.update(sha256)
        self._documents += 1
        self._bytes += size

    def close(self, *, domain: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the manifest's entry of the source, with `more` in it; its rows of `files`)."""
        self._end_shard()
        for part in (self._ends, self._names):
            self._files[part.path.name] = part.close()
        entry = {
            "domain": domain,
            "tokens": self._tokens,
            "documents": self._documents,
            "bytes": self._bytes,
            "shards": self._shards,
            "ends": self._ends.path.name,
            "names": self._names.path.name,
            "text_fingerprint": self._texts.hexdigest()[:16],  # the same under every tokenizer
            "fingerprint": digest({n: f["sha256"] for n, f in self._files.items()}),
            **more,
        }
        return entry, self._files

    def abandon(self) -> None:
        """Closes the files as they are, after an error."""
        for file in (self._shard, self._ends, self._names):
            if file:
                file.abandon()

    def _write(self, ids: np.ndarray) -> None:
        raw = memoryview(np.ascontiguousarray(ids, self._dtype).tobytes())
        self._tokens += len(ids)
        while len(raw):
            if self._shard is None:
                self._shards.append(f"{self._stem}-{len(self._shards):05d}.bin")
                self._shard = _File(self._folder / self._shards[-1])
            part = raw[: self._shard_bytes - self._shard.bytes]
            self._shard.write(part)
            raw = raw[len(part) :]
            if self._shard.bytes == self._shard_bytes:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._shard:
            self._files[self._shard.path.name] = self._shard.close()
            self._shard = None


def new_manifest(
    tokenizer: Tokenizer,
    sources: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """A manifest without held-out sets; `files` has every file's row, the tokenizer's too."""
    return {
        "format": FORMAT,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "dtype": tokenizer.dtype.str,
            "fingerprint": tokenizer.fingerprint,
            "specials": dict(tokenizer.specials),
        },
        "files": dict(files),
        "sources": dict(sources),
        "heldout": {},
        "overlap": {},
        **more,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Its row of `files`."""
    return {"tokenizer.json": write_file(folder / "tokenizer.json", [tokenizer.json.encode()])}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest at once, after every file that it names is on the disk."""
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    unfinished = folder / (MANIFEST + ".tmp")
    write_file(unfinished, [text.encode()])
    os.replace(unfinished, folder / MANIFEST)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, parts: Iterable[bytes]) -> dict[str, Any]:
    """Writes and syncs a file. {"bytes", "sha256"} of it."""
    file = _File(path)
    for part in parts:
        file.write(part)
    return file.close()


class _File:
    """A file being written, with its size and its SHA-256 so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self._sha256 = hashlib.sha256()
        self._stream: BinaryIO = open(path, "wb")

    def write(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self.bytes += self._stream.write(data)

    def abandon(self) -> None:
        self._stream.close()

    def close(self) -> dict[str, Any]:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = loads(path.read_text())
    except FileNotFoundError:
        if ":/" in str(folder):  # what a Path leaves of ://
            raise UserError(f"{folder}: it is a URL; copy it to a disk to change it") from None
        raise UserError(
            f"{folder}: no {MANIFEST} in it; build it with python -m jaxmoe.data build --out"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; build the data set again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found} is not {FORMAT}; build the data set again"
            + (", or if it is of the cache delete the folder" if found == 1 else "")
        )
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Types of what is used, and names: they become paths that are read, written and removed.

    Raises:
        UserError: one is not as this package writes it.
    """
    needed(manifest, dict.fromkeys(("tokenizer", "files", *_PARTS, "overlap"), dict), path)
    about = manifest["tokenizer"]
    needed(about, {"fingerprint": str, "dtype": str}, f"{path}: tokenizer")
    if about["dtype"] not in _DTYPES:
        raise UserError(f"{path}: tokenizer dtype={about['dtype']!r}, not one of {_DTYPES}; {MEND}")
    for name, row in manifest["files"].items():
        if not plain_name(name):
            raise UserError(f"{path}: file {name!r} is not in the folder itself")
        where = f"{path}: file {name}"
        needed({"it": row}, {"it": dict}, where)
        needed(row, {"bytes": int, "sha256": str}, where)
        if row["bytes"] < 0:
            raise UserError(f"{where}: bytes={row['bytes']}; {MEND}")
    for print_, rows in manifest["overlap"].items():
        needed({print_: rows}, {print_: dict}, f"{path}: overlap")
        for source, row in rows.items():
            needed({source: row}, {source: dict}, f"{path}: overlap")
            needed(row, {"leaking": int}, f"{path}: overlap of {source}")
    for part, more in _PARTS.items():
        for name, entry in manifest[part].items():
            where = f"{path}: {part} {name!r}"
            with reading(where, MEND):
                check_name(name)
                needed(entry, {**_ENTRY, **more}, where)
                for file in (*entry["shards"], entry["ends"], entry["names"]):
                    if file not in manifest["files"]:
                        raise UserError(f"{where} names {file!r}, which is not of files; {MEND}")


def _check(folder: Path, name: str, expected: Mapping[str, Any], verify: bool) -> None:
    path = folder / name
    size = path.stat().st_size if path.is_file() else None
    if size != expected["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes, not {expected['bytes']}"
        raise UserError(f"{path} {found}; build the data set again, or copy it whole")
    if verify:
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != expected["sha256"]:
            raise UserError(f"{path} has changed: its SHA-256 is {sha256}; build it again")


def _map_ends(path: Path, fetch: Fetch) -> np.ndarray:
    fetch(path)
    with reading(path, MEND):
        return np.memmap(path, "<i8", mode="r")


def _map(path: Path, dtype: np.dtype, row: Mapping[str, Any]) -> np.ndarray:
    return np.memmap(path, dtype, mode="r")


def _open(
    folder: Path,
    manifest: Mapping[str, Any],
    part: str,
    tokenizer: Tokenizer,
    open_shard: OpenShard,
    fetch: Fetch,
) -> tuple[dict[str, StoredSource], dict[str, Names]]:
    files, dtype = manifest["files"], np.dtype(manifest["tokenizer"]["dtype"])
    sources: dict[str, StoredSource] = {}
    names: dict[str, Names] = {}
    for name, entry in manifest[part].items():
        for file, width in (*((s, dtype.itemsize) for s in entry["shards"]), (entry["ends"], 8)):
            if files[file]["bytes"] % width:
                raise UserError(f"{folder / file}: its size is not of whole numbers; {MEND}")
        shards = [open_shard(folder / s, dtype, files[s]) for s in entry["shards"]]
        ends = partial(_map_ends, folder / entry["ends"], fetch)
        documents = files[entry["ends"]]["bytes"] // 8
        sources[name] = StoredSource(
            name,
            shards,
            ends if documents else np.empty(0, np.int64),
            entry["domain"],
            documents,
            tokenizer.vocab_size,
        )
        names[name] = Names(folder / entry["names"], entry["documents"], fetch)
        found = (sources[name].tokens, sources[name].documents)
        if found != (entry["tokens"], entry["documents"]):
            raise UserError(f"{folder}: {name} has {found} tokens and documents, not as its entry")
    return sources, names
