"""How orbax writes the state: bounded in memory, and with a word to all processes if it fails."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmoe.run.ballot import Ballot

__all__ = ["StateHandler", "StateRestore", "StateSave", "cannot_write", "own_bytes", "said"]

# Of what is compressed and written at a time: this share of the state's bytes, but no less than
# that many bytes. One array's part on a device is written at once, so it has to fit.
SHARE, LEAST = 1 / 16, 32 << 20
PROBE = ".probe"


class StateHandler(ocp.StandardCheckpointHandler):
    """As its base writes and reads, but `ballot` hears what fails in the background."""

    def __init__(self, ballot: Ballot, abstract: Any) -> None:
        """`abstract`: the state's shapes and shardings."""
        parts = [_part(leaf) for leaf in jax.tree.leaves(abstract)]
        in_flight = max(max(parts) + 1, int(SHARE * own_bytes(abstract)), LEAST)
        # Without a limit all arrays are compressed side by side: a second copy of the state.
        super().__init__(save_concurrent_gb=in_flight / 1e9)  # pyright: ignore[reportArgumentType]
        self._ballot = ballot
        self.disk_full = False  # as this save is to find it

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any] | None:
        futures = await super().async_save(*args, **kwargs)
        return [_Heard(self, one) for one in futures or []]

    def finalize(self, directory: Any) -> None:
        self.heard(lambda: super(StateHandler, self).finalize(directory))

    def heard(self, act: Callable[[], Any]) -> Any:
        """What it returns; all processes hear what it raises."""
        try:
            return act()
        except Exception as error:  # whatever the storage layers raise
            self._ballot.fail(said(error))
            raise

    def written(self, future: Any, timeout: float | None) -> Any:
        result = future.result(timeout)
        if self.disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result


class _Heard:
    """A future of orbax (which asks for these two methods)."""

    def __init__(self, handler: StateHandler, future: Any) -> None:
        self._handler, self._future = handler, future

    def result(self, timeout: float | None = None) -> Any:
        return self._handler.heard(lambda: self._handler.written(self._future, timeout))

    def cancel(self) -> Any:
        return self._future.cancel()


@ocp.args.register_with_handler(StateHandler, for_save=True)
class StateSave(ocp.args.StandardSave):
    """A state to save."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
class StateRestore(ocp.args.StandardRestore):
    """The shapes and shardings of a state to restore."""


def cannot_write(folder: Path, size: int) -> str | None:
    """Why this process could not write so many bytes there, as far as can be told before."""
    probe = folder / f"{PROBE}-{jax.process_index()}"
    try:
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
        space = os.statvfs(folder)
    except OSError as error:
        return said(error)
    free = space.f_bavail * space.f_frsize
    # Some file systems of networks know no sizes, and say 0 of 0.
    if space.f_blocks and free < size:
        return f"{free / 1e9:.1f} GB are free, {size / 1e9:.1f} GB are to be written"
    return None


def own_bytes(state: Any) -> int:
    """Of a state's arrays, what this process writes: its devices' parts, each once."""
    return sum(_own(leaf) for leaf in jax.tree.leaves(state))


def _own(array: Any) -> int:
    places = array.sharding.devices_indices_map(array.shape)
    parts = {str(places[device]) for device in array.sharding.addressable_devices}
    return _part(array) * len(parts)


def _part(array: Any) -> int:
    shape = array.sharding.shard_shape(array.shape)
    return array.dtype.itemsize * math.prod(shape)


def said(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
