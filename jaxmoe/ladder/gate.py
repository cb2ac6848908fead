"""Does the gain of a change persist at scale? Two ladders, paired by rung and seed.

The effective compute ratio of a pair is the baseline's compute that gives the candidate's loss over
the candidate's own: exp(y), y = g^-1(g(x) + loss' - loss) - x', with x and x' the logs of both
runs' compute and g the baseline's law of loss over log compute. It is shifted through the
baseline's own run, so that what both runs share (seed, rung) cancels. Then y is a line over log
compute (forecast/trend.py) that goes on to the target: without evidence a gain is taken to last,
and less surely the further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import DenseLaw
from jaxmoe.forecast.points import Points, refuse_thin
from jaxmoe.forecast.trend import Prior, Trend

__all__ = ["LEVEL", "Gate", "Pairs", "gate", "pair_up"]

LEVEL = 0.95  # probability from which on the answer is keep, or below 1 - LEVEL drop
DRAWS = 8  # of the baseline's law
# Of the log ratio: at the largest rung, per e-fold of compute, and how that drifts.
PRIOR = Prior(level=1.0, trend=tuple((sd, 0.003) for sd in (0.003, 0.01, 0.03, 0.1)))
MIN_RUNGS = 3
LEVELS = (0.05, 0.5, 0.95)
FURTHEST = np.log(1e4)  # a ratio beyond which the law is not asked
BELOW = np.log(30)  # likewise below the smallest rung
GRID = 400


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Runs [n] of both ladders with the same rung and seed. Losses in nats per token.

    Attributes:
        rung, seed: ints.
        flops, loss: of the baseline; flops_candidate, loss_candidate: of the change.
        law: the baseline's runs, also those without a partner.
    """

    rung: np.ndarray
    seed: np.ndarray
    flops: Floats
    loss: Floats
    flops_candidate: Floats
    loss_candidate: Floats
    law: Points


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """The answer. Ratios are of effective compute: above 1 the candidate is better.

    Attributes:
        rungs: [k] their numbers; flops: [k] of the baseline; pairs: [k] how many.
        probability: that the ratio at the target is above `worth`.
        noise: relative standard deviation of a pair's difference, posterior median.
    """

    rungs: np.ndarray
    flops: Floats
    pairs: np.ndarray
    probability: float
    noise: float
    target: float
    worth: float
    level: float
    line: Trend
    law: "Law"

    @cached_property
    def measured(self) -> Floats:
        """[3, k] ratio of each rung, quantiles 5, 50, 95 %."""
        return np.exp(self.line.measured().quantile(LEVELS))

    @cached_property
    def trend(self) -> Floats:
        """[3] log ratio per e-fold of compute, quantiles."""
        return self.line.slope().quantile(LEVELS)[:, 0]

    @cached_property
    def projection(self) -> Floats:
        """[3] ratio at the target, quantiles."""
        ahead = float(np.log(self.target / self.flops.max()))
        return np.exp(self.line.at(ahead).quantile(LEVELS)[:, 0])

    @property
    def verdict(self) -> str:
        """keep, drop or undecided."""
        if self.probability >= self.level:
            return "keep"
        return "drop" if self.probability <= 1 - self.level else "undecided"


def pair_up(baseline: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]) -> Pairs:
    """Pairs of records by rung, seed and tokens: of each the longest run that both have.

    Raises:
        UserError: held-out sets, training text or tokenizer differ, or too few rungs are paired.
    """
    both = [*baseline, *candidate]
    for name in ("set_fingerprint", "train_fingerprint", "tokenizer_fingerprint"):
        values = sorted({str(row[name]) for row in both})
        if len(values) > 1:
            raise UserError(
                f"{name}: {' and '.join(values)}; losses of both ladders must be of the same text"
            )
    ours = {(r["rung"], r["seed"], r["tokens"]): r for r in baseline}
    theirs = {(r["rung"], r["seed"], r["tokens"]): r for r in candidate}
    longest: dict[tuple[int, int], tuple[int, int, int]] = {}
    for found in sorted(ours.keys() & theirs.keys()):
        longest[found[:2]] = found
    rungs = {rung for rung, _ in longest}
    if len(rungs) < MIN_RUNGS:
        raise UserError(
            f"{len(rungs)} rungs have runs of both ladders with the same seed and tokens; a trend"
            f" needs {MIN_RUNGS}"
        )
    keys = sorted(longest.values())
    column = lambda rows, name: np.array([rows[k][name] for k in keys], np.float64)  # noqa: E731
    whole: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in sorted(baseline, key=lambda r: r["tokens"]):
        whole[(row["rung"], row["seed"])] = row
    names = ("params_active", "tokens", "loss", "flops")
    law = {name: [float(row[name]) for row in whole.values()] for name in names}
    return Pairs(
        rung=np.array([k[0] for k in keys]),
        seed=np.array([k[1] for k in keys]),
        flops=column(ours, "flops"),
        loss=column(ours, "loss"),
        flops_candidate=column(theirs, "flops"),
        loss_candidate=column(theirs, "loss"),
        law=Points.of(law["params_active"], law["tokens"], law["loss"], flops=law["flops"]),
    )


def gate(
    pairs: Pairs, target: float, *, worth: float = 1.0, level: float = LEVEL, seed: int = 0
) -> Gate:
    """Whether the candidate's ratio at `target` FLOPs of the baseline is above `worth`.

    Raises:
        UserError: too few or too alike budgets, or a number out of range.
    """
    for name, value in (("--at", target), ("--worth", worth)):
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: it must be a finite number above 0")
    if not 0.5 < level < 1:
        raise UserError(f"--level {level}: a probability above 0.5 and below 1")
    refuse_thin(pairs.law)
    law = Law.of(pairs.law, np.random.default_rng(seed))
    numbers = np.unique(pairs.rung)
    which = np.searchsorted(numbers, pairs.rung)
    count = np.bincount(which).astype(np.float64)
    mean = lambda v: np.stack([np.bincount(which, row) / count for row in v])  # noqa: E731
    x = np.log(pairs.flops)
    shifted = law.compute(x, pairs.loss_candidate - pairs.loss)
    y = np.clip(shifted, -FURTHEST, FURTHEST) - np.log(pairs.flops_candidate / pairs.flops)
    place = mean(x[None])[0]
    steep = law.steep(place)
    line = Trend(
        x=place - place.max(),
        count=count,
        y=mean(y),
        steep=steep,
        scatter=_scatter(y, mean(y), which, steep),
        freedom=float(np.sum(count - 1)),
        prior=PRIOR,
    )
    ahead = float(np.log(target) - place.max())
    found = line.at(ahead)
    return Gate(
        rungs=numbers,
        flops=np.exp(place),
        pairs=count.astype(int),
        probability=float(1 - found.cdf(np.array([[np.log(worth)]]))[0, 0]),
        noise=float(np.exp(line.weight @ np.log(line.noise))),
        target=target,
        worth=worth,
        level=level,
        line=line,
        law=law,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """Draws of the baseline's law: loss [DRAWS, GRID], falling, over log compute [GRID]."""

    x: Floats
    loss: Floats

    @classmethod
    def of(cls, points: Points, rng: np.random.Generator) -> "Law":
        ends = np.log(points.flops)
        x = np.linspace(ends.min() - BELOW, ends.max() + FURTHEST, GRID)
        target = Points.of(np.ones(GRID), np.exp(x), flops=np.exp(x))
        loss = DenseLaw(name="compute").fit(points).curves(target, n=DRAWS, rng=rng)
        # A draw with a negative transient turns below the ladder, where it says nothing.
        falling: Floats = np.maximum.accumulate(loss[:, ::-1], axis=1)[:, ::-1]
        return cls(x=x, loss=falling - 1e-9 * np.arange(GRID))

    def compute(self, x: Floats, change: Floats) -> Floats:
        """[DRAWS, n] e-folds of compute that change the loss at `x` [n] by `change` [n] nats."""
        rows = []
        for loss in self.loss:
            wanted = np.interp(x, self.x, loss) + change
            rows.append(np.interp(wanted, loss[::-1], self.x[::-1]) - x)
        return np.stack(rows)

    def steep(self, x: Floats) -> Floats:
        """[DRAWS, n] e-folds of compute for one relative unit of the loss."""
        slopes = np.gradient(np.log(self.loss), self.x, axis=1)
        at = np.stack([np.interp(x, self.x, slope) for slope in slopes])
        return 1 / np.maximum(-at, 1e-4)


def _scatter(y: Floats, mean: Floats, which: np.ndarray, steep: Floats) -> Floats:
    """[DRAWS] sum of squares of the pairs about their rungs' means, in relative loss."""
    return np.sum(((y - mean[:, which]) / steep[:, which]) ** 2, axis=1)
