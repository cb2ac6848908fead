"""Bad steps: a loss or gradient that is not finite, or far above those of the steps before.

The device decides, by limits that come with the batch, and keeps the state of before such a step.
So the loop never waits, and all processes, which read the same flag a step later, go on alike.
"""

import math
from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import GuardConfig

__all__ = ["BadStep", "Guard"]

# Good steps that limits are drawn from, as many as OLMo-core's SkipStepOptimizer takes, and below
# which there are none.
WINDOW, LEAST = 128, 32
# Of the logs' deviation, at least. A batch's loss varies by a few per cent; its gradient's norm by
# tens, and 5 to 6 times in thousands of steps of small batches (LOG.md, 2026-11-23): 6 sd are 8.
FLOORS = (0.02, 0.35)
CALM = 64  # good steps that make bad ones before them forgotten


class BadStep(FloatingPointError):
    """A step that the run does not get over."""


class Guard:
    """Limits of the loss and of the gradient's norm, and what was found bad.

    Attributes:
        skipped: updates left out so far.
    """

    def __init__(self, config: GuardConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._good: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + 1)
        self._bad: list[int] = []  # steps, since there were CALM good ones
        self._asked = [np.full(2, np.inf, np.float32)] * 4  # limits of the last steps, by number
        self._skipped: Container[int] | None = None  # of a replay
        self.skipped = 0

    @property
    def active(self) -> bool:
        return self._config.bad_step != "stop"

    def limits(self, step: int, since: int = 1) -> Any:
        """float32 [2] on all devices: what the loss and the norm of update `step` may be.

        From steps up to the second before it: that before it may not have been read yet. `since`:
        from which step on they are of its kind.
        """
        found = self._limits(step, since)
        self._asked[step % len(self._asked)] = found
        if self._skipped is not None:
            found = np.full(2, -np.inf if step in self._skipped else np.inf, np.float32)
        return mesh_lib.everywhere(self._mesh, found)

    def _limits(self, step: int, since: int) -> np.ndarray:
        known = [row[1:] for row in self._good if since <= row[0] <= step - 2][-WINDOW:]
        if len(known) < LEAST:
            return np.full(2, np.inf, np.float32)
        logs = np.log(np.maximum(known, 1e-30))
        found = logs.mean(0) + self._config.sigmas * np.maximum(logs.std(0), FLOORS)
        return np.exp(np.minimum(found, 80)).astype(np.float32)

    def read(self, step: int, loss: float, norm: float, *, bad: bool) -> str | None:
        """What was wrong with an update, by the device's word; None: nothing.

        Raises:
            BadStep: too many in too few steps.
        """
        if not bad:
            self._good.append((step, loss, norm))
            if self._bad and step - self._bad[-1] > CALM:
                self._bad = []
            return None
        self.skipped += 1
        self._bad.append(step)
        why = self._said(step, loss, norm)
        if len(self._bad) > self._config.patience:
            raise BadStep(
                f"step {step}: {why}; bad steps {self._bad[0]} to {step}, more than"
                f" guard.patience={self._config.patience} without {CALM} good ones between"
            )
        return why

    def _said(self, step: int, loss: float, norm: float) -> str:
        limits = self._asked[step % len(self._asked)]
        named = (("train loss", loss, limits[0]), ("gradient's norm", norm, limits[1]))
        found = [
            f"the {name} is {value:.6g}, and may be {limit:.6g}"
            for name, value, limit in named
            if not math.isfinite(value) or value > limit
        ]
        return "; ".join(found)

    def replay(self, skipped: Container[int]) -> None:
        """From here on just these updates are left out, and those that are not finite."""
        self._skipped = skipped

    def rolled_back(self, begun: int, step: int, then: dict[str, Any] | None) -> None:
        """The updates after `begun` are left out, beside `step` itself. Limits come from the steps
        that they came from `then`, of which this is the state."""
        self.skipped += step - 1 - begun
        self._set_good(then["good"] if then else [])

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"good": [*self._good], "bad": self._bad, "skipped": self.skipped}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._set_good(state["good"])
            self._bad, self.skipped = [*state["bad"]], state["skipped"]

    def _set_good(self, rows: Iterable[Sequence[float]]) -> None:
        self._good = deque(((int(s), a, b) for s, a, b in rows), maxlen=WINDOW + 1)
