"""Which process is slow: all wait for the slowest, so what tells them apart is the time that a
process spends on its own part of a step, and not in waiting for results.

It sees what the host does (drawing data, the interpreter, a core that is shared). A slow device
makes all wait alike.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["Pace", "slowest"]

SHARE = 0.1  # of a step: a process that loses less than this is not told
IN_A_ROW = 2  # times that it was found: a forecast or a disk may hold one up for once


class Pace:
    """Own seconds of a step, compared between processes."""

    def __init__(self, mesh: Mesh, factor: float) -> None:
        self._mesh, self._factor = mesh, factor
        self._first = {d.process_index: n for n, d in reversed([*enumerate(mesh.devices.flat)])}
        self._sent: jax.Array | None = None
        self._slow: int | None = None  # the process that was found last
        self._times = 0  # in a row
        self._steps = -1  # the first one begins it
        self._forget()

    def _forget(self) -> None:
        self._begun = time.perf_counter()
        self._waited = 0.0
        self._steps = min(self._steps, 0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is a step's, but not the process's own."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is no step's."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun

    def stepped(self) -> None:
        """Also called before the first step: what was before is no part of it."""
        self._steps += 1
        if self._steps == 0:
            self._forget()

    def compare(self) -> str | None:
        """Which process was slow between the last calls of this, and between those before: told
        once as long as it stays. Sends what was measured since. All processes call it at the same
        steps."""
        if jax.process_count() == 1 or self._steps <= 0:
            return None
        found, self._sent = self._sent, self._measured()
        self._forget()
        if found is None:
            return None
        with self.waiting():
            values = np.asarray(found)
        own, whole = values[[self._first[p] for p in sorted(self._first)]].T
        step = float(np.median(whole))
        rank = slowest(own, step, self._factor)
        self._times = self._times + 1 if rank == self._slow else 1
        self._slow = rank
        if rank is None or self._times != IN_A_ROW:
            return None
        return (
            f"rank {rank} spends {own[rank]:.3g} s of a step of {step:.3g} s on its own part, the"
            f" middle one {_middle(own):.3g} s"
        )

    def _measured(self) -> jax.Array:
        """float32 [devices, 2]: own and whole seconds of a step, of the process of each."""
        whole = time.perf_counter() - self._begun
        steps = max(1, self._steps)
        mine = np.array([[(whole - self._waited) / steps, whole / steps]], np.float32)
        spread = NamedSharding(self._mesh, P(self._mesh.axis_names))
        shape = (self._mesh.size, 2)
        return _everywhere(jax.make_array_from_callback(shape, spread, lambda _: mine))


def slowest(own: np.ndarray, step: float, factor: float) -> int | None:
    """The process whose own seconds are `factor` times the middle one's, and a tenth of a step
    more."""
    rank = int(np.argmax(own))
    middle = _middle(own)
    slow = own[rank] > factor * middle and own[rank] - middle > SHARE * step
    return rank if slow else None


def _middle(own: np.ndarray) -> float:
    """The lower median: of two, the faster one."""
    return float(np.sort(own)[(len(own) - 1) // 2])


@jax.jit
def _everywhere(values: jax.Array) -> jax.Array:
    return jax.reshard(values, P())
