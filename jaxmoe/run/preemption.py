"""A request to end: SIGTERM or SIGUSR1, to any process of a run, heard by all at the same step.

Schedulers tell one process or all of them that their time is over. What one hears is a vote; votes
are summed over the mesh's devices with each step and read a step later, as metrics are, so that no
step waits for them and all processes stop after the same one.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.exits import REQUESTS

__all__ = ["Preempted", "Preemption"]


class Preempted(Exception):
    """The run was asked to end; its state is saved."""


class Preemption:
    """What was heard, and what all agree on."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._heard: str | None = None
        self._votes: jax.Array | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are requests inside; outside they end the process, as they always do."""
        before = {one: signal.signal(one, self._hear) for one in REQUESTS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def asked(self) -> bool:
        """Whether any process has heard a request; the same answer in all, which ask at each
        step."""
        if jax.process_count() == 1:
            return self._heard is not None
        votes, self._votes = self._votes, _count(self._own_vote())
        return votes is not None and int(votes) > 0

    @property
    def why(self) -> str:
        """Which signal this process has heard."""
        return self._heard or "another process was asked to end"

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._heard = signal.Signals(number).name

    def _own_vote(self) -> jax.Array:
        """[devices] 1 on those of a process that was asked."""
        spread = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        mine = np.full(1, self._heard is not None, np.int32)
        shape = (self._mesh.size,)
        return jax.make_array_from_callback(shape, spread, lambda _: mine, dtype=jnp.int32)


@jax.jit
def _count(votes: jax.Array) -> jax.Array:
    return jnp.sum(votes)
