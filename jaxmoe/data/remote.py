"""Data sets that lie elsewhere: gs://, s3://, http(s):// and file:// URLs, by tensorstore.

Of a training shard only the blocks of 1 KiB are read in which there are tokens that are asked for.
All other files are kept whole under CACHE/remote/KEY, where KEY is of the URL and of the manifest;
each is brought when it is first needed, compared with its SHA-256, and mapped.
"""

import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from jaxmoe import stores
from jaxmoe.data.damage import UNREADABLE, Damaged, Guard
from jaxmoe.data.dataset import MANIFEST, DataSet, digest, open_data_set, read_manifest
from jaxmoe.errors import UserError

__all__ = ["Store", "is_url", "open_remote"]

BLOCK = 1 << 10  # bytes: a sequence of 1,024 tokens has 2 or 4
CACHED = 64 << 20  # bytes of blocks that a process keeps
_PART = 1 << 22  # of a file that is read whole
_SCHEMES = ("gs", "s3", "http", "https", "file")


def is_url(path: str) -> bool:
    """Whether tensorstore reads it, instead of the file system."""
    return "://" in path and urlsplit(path).scheme in _SCHEMES


class Store:
    """The files of one folder. Requests are repeated by tensorstore, with its settings."""

    def __init__(self, url: str) -> None:
        """Raises UserError: no store can have such a URL."""
        self.url = url if url.endswith("/") else url + "/"
        # Opening waits for seconds; a run that is under way as long as tensorstore does by itself.
        self._long, self._short = (stores.opened(self.url, c) for c in (None, stores.SHORT))

    def whole(self, name: str) -> bytes | None:
        """Of a small file; None: there is none. Raises UserError: the store cannot be read."""
        found = self._read(name, None, self._short)
        return None if found is None or found.state == "missing" else found.value

    def read(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes start .. stop of a file; None: it has not so many, or there is none.

        Raises:
            UserError: the store cannot be read, however often it was asked.
        """
        if start == stop:
            return b""
        found = self._read(name, slice(start, stop), self._long)
        if found is None or found.state == "missing" or len(found.value) != stop - start:
            return None
        return found.value

    def parts(self, name: str, size: int) -> Iterator[bytes | None]:
        """All of a file of `size` bytes, and None in the place of what it does not have."""
        for start in range(0, size, _PART):
            yield self.read(name, start, min(start + _PART, size))

    def _read(self, name: str, part: slice | None, store: Any) -> Any:
        try:
            return store.read(name, byte_range=part).result()
        except ValueError as error:  # tensorstore's, of anything that went wrong
            if "OUT_OF_RANGE" in str(error):
                return None
            raise UserError(f"{self.url}{name}: {stores.said(error)}") from None


class _Blocks:
    """The last blocks that were read, of any file: CACHED bytes of them at the most."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, name: str, size: int, start: int, stop: int) -> bytes | None:
        """As `Store.read`, of a file of `size` bytes."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        with self._lock:
            found = {n: self._kept.get((name, n)) for n in range(first, last)}
        for a, b in _runs([n for n, block in found.items() if block is None]):
            raw = self._store.read(name, a * BLOCK, min(b * BLOCK, size))
            if raw is None:
                return None
            found.update({n: raw[(n - a) * BLOCK : (n - a + 1) * BLOCK] for n in range(a, b)})
        with self._lock:
            for n, block in found.items():
                self._kept[name, n] = block or b""
                self._kept.move_to_end((name, n))
            while len(self._kept) > CACHED // BLOCK:
                self._kept.popitem(last=False)
        whole = b"".join(block or b"" for block in found.values())
        return whole[start - first * BLOCK : stop - first * BLOCK]


class _Shard:
    """A training shard like an array [tokens] of which a slice is read when it is asked for."""

    def __init__(
        self, blocks: _Blocks, name: str, dtype: np.dtype, size: int, guard: Guard, where: str
    ) -> None:
        self._blocks, self._name, self._guard, self._where = blocks, name, guard, where
        self._size, self.dtype = size, dtype
        self._told = False

    def __len__(self) -> int:
        return self._size // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens; int32 `UNREADABLE` where there are none and that is skipped.

        Raises:
            Damaged: there are none, and it is to stop.
        """
        start, stop, _ = part.indices(len(self))
        width = self.dtype.itemsize
        raw = self._blocks.read(self._name, self._size, start * width, stop * width)
        if raw is not None:
            return np.frombuffer(raw, self.dtype)
        fault = f"{self._where} is missing, or has not its {self._size} bytes"
        if not self._told:
            self._told = True
            self._guard.tell(fault)
        if self._guard.policy == "stop":
            raise Damaged(f"{fault}; {self._guard.mend}, or train with data.damaged=skip")
        return np.full(stop - start, UNREADABLE, np.int32)


def open_remote(url: str, cache: Path, policy: Literal["stop", "skip"]) -> tuple[DataSet, Guard]:
    """The data set at a URL, whose training shards stay there; `cache` keeps the other files.

    Shards are not compared with their SHA-256, which takes all of them: `data verify URL` does it.

    Raises:
        UserError: the URL cannot be read, or there is no data set.
    """
    store, guard = Store(url), Guard(policy)
    text = store.whole(MANIFEST)
    if text is None:
        raise UserError(f"{store.url}: no {MANIFEST} in it; give the URL of a data set")
    folder = cache / "remote" / digest([store.url, hashlib.sha256(text).hexdigest()])
    folder.mkdir(parents=True, exist_ok=True)
    _keep(folder / MANIFEST, [text])
    files = read_manifest(folder)["files"]
    blocks = _Blocks(store)

    def open_shard(path: Path, dtype: np.dtype, row: Mapping[str, Any]) -> _Shard:
        return _Shard(blocks, path.name, dtype, row["bytes"], guard, store.url + path.name)

    def fetch(path: Path) -> None:
        _fetch(store, path, files[path.name])

    return open_data_set(folder, open_shard=open_shard, fetch=fetch), guard


def _fetch(store: Store, path: Path, row: Mapping[str, Any]) -> None:
    """A whole file, if it is not there yet; several processes may do it at once."""
    if path.is_file() and path.stat().st_size == row["bytes"]:
        return
    sha256 = hashlib.sha256()

    def parts() -> Iterator[bytes]:
        for part in store.parts(path.name, row["bytes"]):
            if part is None:  # however many more the manifest claims
                break
            sha256.update(part)
            yield part
        if sha256.hexdigest() != row["sha256"]:
            raise UserError(f"{store.url}{path.name} is not as it was written; copy it there again")

    _keep(path, parts())


def _keep(path: Path, parts: Any) -> None:
    """Writes a file that appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink()
        raise


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, end)."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found
