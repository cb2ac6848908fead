"""Members stacked by backtest: each law forecasts the largest runs from the smaller ones.

A law's weight is its prior share times exp(sum of its log scores in the backtests): the posterior
of "which law extrapolates this ladder", from forecasts alone, never from the fit of what it saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import (
    DEFAULT,
    LAWS,
    Constants,
    DenseFit,
    DenseLaw,
    with_constants,
)
from jaxmoe.forecast.mixture import Mixture, combine
from jaxmoe.forecast.points import MIN_BUDGETS, Points, refuse_thin

__all__ = ["Backtest", "Stack", "StackFit", "backtest", "frontier_spread", "misfits"]

PRIOR_SHARE = {"chinchilla": 0.5, "outer power": 0.25, "compute": 0.25}
ORIGINS = (3.0, 10.0)  # backtests: the runs within this factor of the largest are held out
EFFECTIVE = 1.0  # run that those held out in one backtest count for: they err alike
FRONTIER = 0.35  # spread of log(D / N) about its trend in log C up to which C alone is a law
WORST_SCORE = -4.0  # nats under that of the best law that one backtest may cost
MAX_SPREAD = 1.5
CONSTANTS = 3  # of L(C), which budgets must exceed to contradict it
MISFIT = 4.0  # sigmas from the other runs at which a rung is flagged


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """What each law made of the held-out runs, all larger than those it saw."""

    ratio: float  # of compute: the largest run over the largest seen
    runs: int  # held out
    error: tuple[float, ...]  # (median - outcome) / outcome of the largest run, one a law
    score: tuple[float, ...]  # log density, of EFFECTIVE runs at most, one a law


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The laws of `dense_laws`, weighed by backtest."""

    constants: Constants = DEFAULT
    names: tuple[str, ...] = tuple(PRIOR_SHARE)

    def laws(self, points: Points) -> tuple[DenseLaw, ...]:
        """The members for these runs: compute alone is a law only where N and D follow from it."""
        names = [n for n in self.names if n != "compute" or frontier_spread(points) <= FRONTIER]
        return tuple(law for law in with_constants(self.constants) if law.name in names)

    def fit(self, points: Points) -> "StackFit":
        """Raises UserError where the runs are too few or too alike to extrapolate."""
        refuse_thin(points)
        laws = self.laws(points)
        if not laws:
            raise UserError(
                f"{', '.join(self.names)}: no such law fits these runs; use {list(PRIOR_SHARE)}"
            )
        tests = backtest(points, laws)
        log = np.log([PRIOR_SHARE[law.name] for law in laws])
        for test in tests:
            score = np.array(test.score)
            log = log + np.maximum(score - score.max(), WORST_SCORE)
        weight = np.exp(log - log.max())
        return StackFit(
            fits=tuple(law.fit_unchecked(points) for law in laws),
            weight=weight / weight.sum(),
            backtests=tuple(tests),
            spread=min(frontier_spread(points), MAX_SPREAD),
            budgets=int(points.budgets.size),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StackFit:
    """Fitted laws, their weights [laws], and the backtests these rest on."""

    fits: tuple[DenseFit, ...]
    weight: Floats
    backtests: tuple[Backtest, ...]
    spread: float  # of log(D / N) off one frontier, at most MAX_SPREAD
    budgets: int  # distinct budgets of compute

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each law by name."""
        names = [fit.law.name for fit in self.fits]
        return {name: float(w) for name, w in zip(names, self.weight, strict=True)}

    def mixture(self, target: Points) -> Mixture:
        """What would be measured at the target's runs."""
        k = self.fits[0].law.constants
        drawn = self.uncalibrated(target)
        centre = drawn.predict()
        extra = k.misfit * self.spread * centre
        return drawn.calibrated(width=self.width(), extra=extra, centre=centre)

    def width(self, width: float | None = None, few: float | None = None) -> float:
        """Factor of the members' width: more than `Constants.width` where budgets are few."""
        k = self.fits[0].law.constants
        ratio = (k.few if few is None else few) / max(self.budgets - CONSTANTS, 1)
        return (k.width if width is None else width) * float(np.sqrt(1 + ratio))

    def uncalibrated(self, target: Points) -> Mixture:
        """The mixture of the members alone."""
        return combine([fit.mixture(target) for fit in self.fits], self.weight)

    def predict(self, target: Points) -> Floats:
        """[t] medians, nats per token."""
        return self.mixture(target).predict()

    def sample(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of what would be measured."""
        return self.mixture(target).sample(n, rng)


def backtest(points: Points, laws: Sequence[DenseLaw]) -> list[Backtest]:
    """Leave-the-largest-out over compute, at each of ORIGINS, where enough budgets are left."""
    top = float(points.flops.max())
    tests: list[Backtest] = []
    for factor in ORIGINS:
        seen = points.flops < top / factor * (1 + 1e-9)
        part, rest = points.take(seen), points.take(~seen)
        if part.budgets.size < MIN_BUDGETS or len(rest) == 0:
            continue
        drawn = [law.fit_unchecked(part).mixture(rest) for law in laws]
        last = int(np.argmax(rest.flops))
        counts = min(EFFECTIVE, len(rest))
        tests.append(
            Backtest(
                ratio=top / float(part.flops.max()),
                runs=len(rest),
                error=tuple(float(m.predict()[last] / rest.loss[last] - 1) for m in drawn),
                score=tuple(counts * float(np.mean(m.log_score(rest.loss))) for m in drawn),
            )
        )
    return tests


def frontier_spread(points: Points) -> float:
    """Standard deviation of log(D / N) about a quadratic in log C: 0 on one line of runs."""
    x = np.log(points.flops / points.flops.max())
    y = np.log(points.tokens / points.params_active)
    if points.budgets.size < MIN_BUDGETS:
        return 0.0
    return float(np.std(y - np.polyval(np.polyfit(x, y, 2), x)))


def misfits(points: Points, law: DenseLaw | None = None) -> list[int]:
    """Indices of runs that do not collapse onto the others: MISFIT sigmas off, left out in turn.

    Such a rung is mis-tuned or its loss is of another held-out set; nothing is dropped for it.
    """
    law = law or LAWS[0]
    found = []
    for i in range(len(points)):
        others = np.arange(len(points)) != i
        if points.take(others).budgets.size < MIN_BUDGETS:
            continue
        z = law.fit_unchecked(points.take(others)).mixture(points.take([i]))
        if abs(z.surprise(points.loss[[i]])[0]) > MISFIT:
            found.append(i)
    return found
