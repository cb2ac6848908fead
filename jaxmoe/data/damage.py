"""Shards that are compared with their SHA-256 when they are first read, and what then happens."""

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.errors import UserError

__all__ = ["UNREADABLE", "Damaged", "Guard", "LazyShard", "hide", "open_guarded"]

UNREADABLE = -1  # a token of a damaged shard that is skipped
_BLOCK = 1 << 22
_MEND = "copy it whole again"


class Damaged(UserError):
    """A shard is not as it was written; the message names it and the mend."""


class Guard:
    """What was found damaged, by any reader of a data set."""

    def __init__(self, policy: Literal["stop", "skip"], mend: str = _MEND) -> None:
        """skip: tokens of a damaged shard are `UNREADABLE`; stop: reading one raises `Damaged`,
        which tells the `mend`."""
        self.policy, self.mend = policy, mend
        self._lock = threading.Lock()
        self._news: list[str] = []
        self._shards: list[LazyShard] = []

    def news(self) -> list[str]:
        """Damage found since this was last asked."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def tell(self, what: str) -> None:
        with self._lock:
            self._news.append(what)

    def open_shard(self, path: Path, dtype: np.dtype, row: Mapping[str, Any]) -> "LazyShard":
        """For `open_data_set`."""
        shard = LazyShard(path, dtype, row, self)
        self._shards.append(shard)
        return shard

    def rehearse(self, number: int) -> bool:
        """From its next read on, a shard (counted round) reads as if a bit of its file had changed;
        the file stays as it is. False if there is no such shard: those at a URL are not compared.
        """
        if self._shards:
            self._shards[number % len(self._shards)].rehearse()
        return bool(self._shards)


class LazyShard:
    """A row of tokens like an array [tokens]; its file is opened and compared at the first read."""

    def __init__(self, path: Path, dtype: np.dtype, row: Mapping[str, Any], guard: Guard) -> None:
        self._path, self._row, self._guard = path, row, guard
        self.dtype = dtype
        self._lock = threading.Lock()
        self._tokens: np.ndarray | None = None
        self._fault: str | None = None
        self._rehearses = False

    def rehearse(self) -> None:
        """As Guard.rehearse."""
        with self._lock:
            self._rehearses, self._tokens = True, None

    def __len__(self) -> int:
        return self._row["bytes"] // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens; int32 `UNREADABLE` of a damaged shard that is skipped.

        Raises:
            Damaged: it is to stop.
        """
        tokens = self._tokens
        if tokens is None:
            with self._lock:
                tokens = self._open() if self._tokens is None else self._tokens
        if self._fault is not None and self._guard.policy == "stop":
            raise Damaged(f"{self._fault}; {self._guard.mend}, or train with data.damaged=skip")
        return tokens[part]

    def _open(self) -> np.ndarray:
        self._fault = _fault(self._path, self._row, self._rehearses)
        if self._fault is None:
            self._tokens = np.memmap(self._path, self.dtype, mode="r")
        else:  # one value that is repeated: a shard may have 500 M tokens
            self._tokens = np.broadcast_to(np.int32(UNREADABLE), (len(self),))
            self._guard.tell(self._fault)
        return self._tokens


def open_guarded(
    folder: str | Path, policy: Literal["stop", "skip"], mend: str = _MEND
) -> tuple[DataSet, Guard]:
    """A data set whose training shards are compared as they are read; the other files are now.

    Raises:
        UserError: as `open_data_set`, or a source's ends are damaged: without them none of its
            documents is known.
    """
    guard = Guard(policy, mend)
    data = open_data_set(folder, open_shard=guard.open_shard)
    for entry in data.manifest["sources"].values():
        path = data.folder / entry["ends"]
        fault = _fault(path, data.manifest["files"][entry["ends"]])
        if fault is not None:
            raise UserError(f"{fault}; build the data set again, or copy it whole")
    return data, guard


def hide(tokens: np.ndarray, weights: np.ndarray, filling: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows without what could not be read: (tokens, weights).

    Args:
        tokens: int32 [rows, seq_len + 1].
        weights: float32 [rows, seq_len]; 0 where the target is `UNREADABLE`.
        filling: the id that stands for it in the inputs.
    """
    lost = tokens == UNREADABLE
    if not lost.any():
        return tokens, weights
    return np.where(lost, np.int32(filling), tokens), np.where(lost[:, 1:], 0, weights)


def _fault(path: Path, row: Mapping[str, Any], rehearses: bool = False) -> str | None:
    """`rehearses`: as if the first bit of the file had changed."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                if rehearses and size == 0:
                    block = bytes([block[0] ^ 1]) + block[1:]
                digest.update(block)
                size += len(block)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != row["bytes"]:
        return f"{path} has {size} bytes instead of {row['bytes']}"
    if digest.hexdigest() != row["sha256"]:
        return f"{path} has changed: its SHA-256 is {digest.hexdigest()}"
    return None
