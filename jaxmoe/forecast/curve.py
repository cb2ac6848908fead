"""What a law may know of a run: its schedule and the held-out losses seen so far.

Units: losses in nats per token, learning rates relative to the peak, tokens since the start.
A step is a number of updates done, so `lr[k - 1]` is the rate that update `k` used.

Where the batch grows, a step is no unit of progress. All optimisers here divide by the size of the
gradient, which at batches below the critical one is mostly noise, of size B^-1/2. So an update of
rate lr goes lr B^1/2 along the mean gradient, and the noise that a later decay removes has the
temperature lr B^-1/2: the square-root scaling rule of Malladi et al. 2022 (arXiv:2205.10287,
section 5), under which a run is the same function of tokens at every batch. B is relative to the
largest batch, hence 1 wherever it does not grow, and every formula is then that by steps.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxmoe.errors import UserError

__all__ = ["Run", "Schedule", "canonical_observations", "observations_sha256", "until"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SUMS = 16
LARGEST_LOSS = 1e6  # nats per token: what diverged is none, and squares of others are numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The plan of a run, known before it starts.

    Attributes:
        lr: learning rate of every update, relative to its peak, float64 [steps].
        tokens: cumulative tokens after every update, float64 [steps] (6*N*D overflows int64).

    Raises:
        UserError: empty, unequal lengths, a value not finite, a negative rate, all rates zero,
            tokens that do not rise.
    """

    lr: Floats
    tokens: Floats

    def __post_init__(self) -> None:
        lr, tokens = _floats(self.lr), _floats(self.tokens)
        if lr.ndim != 1 or lr.size == 0 or lr.shape != tokens.shape:
            raise UserError(
                f"schedule: lr has shape {lr.shape} and tokens {tokens.shape}; "
                "give both one value for every step"
            )
        bad = np.flatnonzero(~np.isfinite(lr) | (lr < 0) | ~np.isfinite(tokens))
        if bad.size:
            raise UserError(
                f"schedule: at step {bad[0] + 1} lr={lr[bad[0]]} and tokens={tokens[bad[0]]}; "
                "both must be finite and lr at least 0"
            )
        if lr.max() <= 0:
            raise UserError(
                "schedule: every lr is 0; give rates relative to the peak, so 1 is the top"
            )
        still = np.flatnonzero(np.diff(tokens, prepend=0.0) <= 0)
        if still.size:
            raise UserError(
                f"schedule: step {still[0] + 1} ends at {tokens[still[0]]} tokens, no more than the"
                " one before; give tokens since the start of the run"
            )
        object.__setattr__(self, "lr", _frozen(lr / lr.max()))
        object.__setattr__(self, "tokens", _frozen(tokens))

    @classmethod
    def of(cls, lr: ArrayLike, *, tokens_per_step: float = 1.0) -> "Schedule":
        """A schedule with an equal number of tokens in every step."""
        rates = _floats(lr)
        return cls(lr=rates, tokens=_floats(np.arange(1, rates.size + 1) * float(tokens_per_step)))

    @property
    def steps(self) -> int:
        return int(self.lr.size)

    @cached_property
    def batch(self) -> Floats:
        """[steps] tokens of each over the largest; exactly 1 (to 1e-6) where all are alike."""
        tokens = np.diff(self.tokens, prepend=0.0)
        return _frozen(np.maximum(np.round(tokens / tokens.max(), 6), 1e-6))

    @cached_property
    def time(self) -> Floats:
        """[steps] tokens after each, in steps of the largest batch: the number of the step, where
        all batches are alike."""
        return _frozen(np.cumsum(self.batch))

    @property
    def warmup_end(self) -> int:
        """The first step whose rate is the peak (to 0.1 %).

        Where the batch grows: the peak of those at one batch (optim.batch_rule raises it with the
        batch), and of the last batch that the rate still rises in.
        """
        starts = np.flatnonzero(np.diff(self.batch, prepend=0.0))
        end = 0
        for start, stop in itertools.pairwise([*starts.tolist(), self.steps]):
            own = self.lr[start:stop]
            peak = start + int(np.argmax(own >= 0.999 * own.max()))
            end = peak if peak > start or start == 0 else end
        return end + 1

    @property
    def annealing(self) -> Floats:
        """[steps] noise of the updates, lr B^-1/2 over its peak, with the warm-up raised to where
        it ends: only what comes after it anneals."""
        noise = self.lr / np.sqrt(self.batch)
        noise /= noise[self.warmup_end - 1 :].max()
        first = noise[self.warmup_end - 1]
        noise[: self.warmup_end] = 1.0 if first >= 0.999 else first
        return noise

    @property
    def progress(self) -> Floats:
        """[steps] of each update along the mean gradient, lr B^1/2; 1 is one at the peak rate."""
        return self.lr * np.sqrt(self.batch)

    @property
    def warmup_progress(self) -> float:
        """Of a warm-up at its own peak: its number of steps, where all batches are alike."""
        peak = float(self.lr[self.warmup_end - 1])
        rate = 1.0 if peak >= 0.999 else peak
        return rate * float(np.sqrt(self.batch[: self.warmup_end]).sum())

    @property
    def sha256(self) -> str:
        """Of all rates and tokens, to the end."""
        parts = (self.lr, self.tokens)
        return hashlib.sha256(b"".join(p.astype("<f8").tobytes() for p in parts)).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What a register says of it: its hash, and the parameters that a person would ask for."""
        full = np.flatnonzero(self.lr >= 0.999)
        return {
            "sha256": self.sha256,
            "steps": self.steps,
            "tokens": float(self.tokens[-1]),
            "warmup_end": self.warmup_end,
            "decay_start": int(full[-1]) + 1,  # the last step at the peak
            "final": float(self.lr[-1]),  # over the peak
            "lr_sums": self._sums().tolist(),
        }

    def agrees(self, summary: Mapping[str, Any]) -> bool:
        """Whether a summary is of this schedule.

        Its rates come from float32 arithmetic, which another kind of device rounds otherwise: where
        the hash differs, sums of the rates up to SUMS steps decide, to 1e-6.
        """
        if summary.get("sha256") == self.sha256:
            return True
        same = (summary.get("steps"), summary.get("tokens")) == (self.steps, self.tokens[-1])
        sums = np.array(summary.get("lr_sums") or [], np.float64)
        own = self._sums()
        return same and sums.shape == own.shape and bool(np.allclose(sums, own, rtol=1e-6, atol=0))

    def _sums(self) -> Floats:
        """Of the relative rates up to SUMS steps, the last of them the end."""
        steps = np.round(np.linspace(0, self.steps, SUMS + 1))[1:].astype(np.int64)
        return np.cumsum(self.lr)[np.maximum(steps, 1) - 1]

    def lr_sum(self, steps: ArrayLike) -> Floats:
        """S1 of Tissue et al. 2024, section 3: sum of the relative rates up to each of `steps`,
        weighed by the square root of the relative batch."""
        return np.cumsum(self.progress)[self.index(steps)]

    def index(self, steps: ArrayLike) -> Ints:
        """Positions of `steps` in the arrays.

        Raises:
            UserError: a step before 1 or after the end of the schedule.
        """
        at = np.atleast_1d(np.asarray(steps)).astype(np.int64)
        outside = at[(at < 1) | (at > self.steps)]
        if outside.size:
            raise UserError(
                f"step {outside[0]} is outside the schedule of {self.steps} steps; "
                f"ask for 1 to {self.steps}"
            )
        return at - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run as a law sees it. Without observations it is a target that is only planned.

    Attributes:
        schedule: of the whole run, also of the part not trained yet.
        steps: int64 [n], updates done at each observation, rising.
        loss: float64 [n], held-out nats per token. Points not finite are dropped and
            counted, and so are those of LARGEST_LOSS or more.
        dropped: how many were.
        params_active, params_total, experts, name: for laws over many runs.

    Raises:
        UserError: lengths differ, steps do not rise, or a step is outside the schedule.
    """

    schedule: Schedule
    steps: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    loss: Floats = field(default_factory=lambda: np.zeros(0))
    params_active: float | None = None
    params_total: float | None = None
    experts: int | None = None
    name: str = "run"
    dropped: int = 0

    def __post_init__(self) -> None:
        steps, loss = np.atleast_1d(np.asarray(self.steps)), np.atleast_1d(_floats(self.loss))
        if steps.shape != loss.shape or steps.ndim != 1:
            raise UserError(
                f"{self.name}: {steps.shape} steps but {loss.shape} losses; give one loss a step"
            )
        keep = np.abs(loss) < LARGEST_LOSS
        steps = steps[keep].astype(np.int64)
        if np.any(np.diff(steps) <= 0):
            late = int(np.flatnonzero(np.diff(steps) <= 0)[0]) + 1
            raise UserError(
                f"{self.name}: step {steps[late]} follows step {steps[late - 1]}; "
                "sort the observations and keep one of each step"
            )
        self.schedule.index(steps)
        object.__setattr__(self, "steps", _frozen(steps))
        object.__setattr__(self, "loss", _frozen(loss[keep]))
        object.__setattr__(self, "dropped", self.dropped + int(np.sum(~keep)))

    def until(self, step: int) -> "Run":
        """The run as it was known at `step`: later observations are gone, the plan stays."""
        keep = self.steps <= step
        return replace(self, steps=self.steps[keep], loss=self.loss[keep])


def until(run: Run, step: int) -> Run:
    """`run.until(step)`."""
    return run.until(step)


def canonical_observations(steps: Sequence[int] | Ints, loss: Sequence[float] | Floats) -> str:
    """Canonical JSON `[[step, loss], ...]` of the finite points, floats as Python's repr."""
    pairs = [[int(s), float(v)] for s, v in zip(steps, loss, strict=True) if np.isfinite(v)]
    return json.dumps(pairs, separators=(",", ":"), allow_nan=False)


def observations_sha256(run: Run) -> str:
    """SHA-256 hex of the canonical JSON of what a fit of this run sees."""
    return hashlib.sha256(canonical_observations(run.steps, run.loss).encode()).hexdigest()


def _floats(values: ArrayLike) -> Floats:
    return np.array(values, dtype=np.float64)


def _frozen(array: Any) -> Any:
    array.setflags(write=False)
    return array
