"""What is watched over while a run trains: deadlines, slow processes, copies of the state."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe.config import HealthConfig
from jaxmoe.run.checksums import Checksums
from jaxmoe.run.pace import Pace
from jaxmoe.run.record import Tell
from jaxmoe.run.watchdog import Watchdog

__all__ = ["Corrupted", "Health"]

CLOSELY = 10  # steps after something was found


class Corrupted(Exception):
    """Devices no longer hold the same; the newest checkpoint is of before."""


class Health:
    """Of one start of a run; all processes do the same."""

    def __init__(self, config: HealthConfig, mesh: Mesh, folder: Path, tell: Tell) -> None:
        """`tell`: of (what, step, why), an event."""
        self._config, self._mesh, self._tell = config, mesh, tell
        self.last_read = 0
        self.closely = 0  # until this step every one is recorded by layer
        self._evaluates = False
        self._steps = False  # the end of one was seen
        self._watchdog = Watchdog(folder, lambda why: tell("hang", self.last_read, why))
        self.pace = Pace(mesh, config.slow)
        self._checksums: Checksums | None = None
        self._sums: tuple[int, jax.Array] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Deadlines hold inside, of which the first is that of the start."""
        self._watchdog.start()
        self.starting("the start, up to the first step,")
        try:
            yield
        finally:
            self._watchdog.close()

    def turn(self, step: int, state: Any, log_every: int) -> None:
        """After `step` updates, before the next one.

        Raises:
            Corrupted: copies differ, as was found in what an earlier turn began.
        """
        self._settle()
        every = self._config.checksum_every
        if every and step % every == 0:
            self._begin(step, state)
        self.pace.stepped()
        if step % log_every == 0 and (told := self.pace.compare()):
            self._tell("slow", step, told)

    def looks(self, step: int) -> bool:
        """Whether the layers' statistics of a step are recorded."""
        every = self._config.statistics_every
        return step <= self.closely or (every > 0 and step % every == 0)

    def look_closely(self, step: int) -> None:
        """Something was found at a step."""
        self.closely = max(self.closely, step + CLOSELY)

    def compare(self, step: int, state: Any) -> None:
        """At once, before the state is saved.

        Raises:
            Corrupted: copies differ.
        """
        self._settle()
        if self._config.checksum_every:
            self._begin(step, state)
            self._settle()

    def _begin(self, step: int, state: Any) -> None:
        if self._checksums is None:
            self._checksums = Checksums(self._mesh, state)
        if self._checksums.share:
            self._sums = (step, self._checksums.of(state))

    def _settle(self) -> None:
        if self._sums is None:
            return
        (step, sums), self._sums = self._sums, None
        assert self._checksums is not None
        with self.pace.waiting():
            found = [*self._checksums.mismatches(sums)]
        if found:
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            why = f"copies differ after step {step}: {found[0]}{more}"
            self._tell("corruption", step, why)
            raise Corrupted(why)

    # Deadlines

    def stepping(self, step: int) -> None:
        """Update `step` is begun, while those before may still be computed. The first ones are part
        of the start: processes connect when they first add something up."""
        what = f"step {step} (the last that was read is {self.last_read})"
        own = self._config
        self._watchdog.expect(what, own.step_deadline if self._steps else own.start_deadline)

    def read(self, step: int) -> None:
        """The results of an update are there."""
        self.last_read = step
        self._steps = True

    def starting(self, what: str) -> None:
        """Compiling, which takes as long as a start may."""
        self._watchdog.expect(what, self._config.start_deadline)

    def evaluating(self, batches: int) -> None:
        """An evaluation; its first one compiles."""
        if not self._evaluates:
            self._evaluates = True
            return self.starting("the first evaluation")
        seconds = self._config.step_deadline * batches
        return self._watchdog.expect(f"{batches} held-out batches", seconds)

    def saving(self, step: int) -> None:
        self._watchdog.expect(f"saving step {step}", self._config.save_deadline)

    def leaving(self) -> None:
        """All is saved; what is still copied elsewhere has a deadline of its own."""
        self._watchdog.expect("the end", 0)
