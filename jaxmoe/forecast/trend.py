"""A line over log compute through what was measured at a ladder's rungs, and where it goes beyond.

    y = level + trend (x - x_top) + error of the line + error of the rung + noise

The line errs as its slope drifts (integrated Brownian motion, zero at the largest rung). Errors of
rungs (one that is mis-tuned) and noise of runs are relative to the loss, of unknown sizes: runs of
one rung tell the noise, the scatter of rungs about the line the rest. The prior of the trend is a
mixture of normals around 0, so it is shrunk, with heavy tails. All sizes have nodes that are
weighed by evidence, and given these everything is Gaussian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import integrated
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.mixture import Mixture, combine

__all__ = ["Prior", "Trend"]

NOISE = np.exp(nodes(np.log(0.0015), 1.5, 9))  # relative, of a run or a pair of runs
RUNG = np.exp(nodes(np.log(0.0005), 1.5, 5))  # relative, of a rung


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Standard deviations: of the level; and, each pair as likely, of the trend, per e-fold of
    compute, and of how it drifts, per e-fold to the power 3/2. `lengths`: e-folds beyond the
    largest rung over which the trend dies away, each as likely."""

    level: float
    trend: Sequence[tuple[float, float]]
    lengths: Sequence[float] = (np.inf,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trend:
    """The line for every draw of y, for m = draws x nodes cases.

    Attributes:
        x: [k] log compute of the rungs over that of the largest.
        count: [k] runs that each was measured by: its noise is over the root of that.
        y: [draws, k] what was measured, means of the runs; steep: [draws, k] of it for one relative
            unit of the loss.
        scatter: [draws] sum of squares of runs about their rungs' means, in relative loss;
            freedom: how many of these are free.
    """

    x: Floats
    count: Floats
    y: Floats
    steep: Floats
    scatter: Floats
    freedom: float
    prior: Prior

    @cached_property
    def noise(self) -> Floats:
        """[m]"""
        return self._nodes[0]

    @cached_property
    def weight(self) -> Floats:
        """[m] by evidence. Draws of y weigh alike: they are of a law that the runs say next to
        nothing of, and a steeper one has larger y."""
        values = self._repeated(self.y)
        fit = np.einsum("mk,mkj,mj->m", values, self._inverse, values)
        log = 0.5 * (np.linalg.slogdet(self._inverse)[1] - fit)
        log -= self.freedom * np.log(self.noise)
        log -= 0.5 * self._repeated(self.scatter) / self.noise**2
        log = log.reshape(len(self.y), -1)
        weight = np.exp(log - log.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True) * len(self.y)
        return weight.ravel()

    def at(self, ahead: float) -> Mixture:
        """Of y `ahead` e-folds beyond the largest rung."""
        return self._ahead(ahead, 0.0)

    def measured_at(self, ahead: float) -> Mixture:
        """Likewise of what one run would give there, where y is a relative loss (steep 1)."""
        return self._ahead(ahead, 1.0)

    def _ahead(self, ahead: float, runs: float) -> Mixture:
        each = []
        for length in self.prior.lengths:
            mean, variance = self.solve(self.x, self.count, self.steep, ahead, self.y, length)
            each.append(self._mixture(mean, variance + runs * self.noise**2))
        return combine(each, np.ones(len(each)))

    def slope(self) -> Mixture:
        """Of the trend at the largest rung, per e-fold; the drift is zero there."""
        square = self._trend_sd**2
        cross = square[:, None] * self.x
        return self._mixture(*self._condition(cross, square, self._inverse, self.y))

    def measured(self) -> Mixture:
        """Of y at each rung by its own runs alone, [k] targets."""
        sd = self._repeated(self.steep) * self.noise[:, None] / np.sqrt(self.count)
        return Mixture(weight=self.weight, mean=self._repeated(self.y), sd=sd).prune()

    def solve(
        self,
        x: Floats,
        count: Floats,
        steep: Floats,
        ahead: float,
        y: Floats | None,
        length: float = np.inf,
    ) -> tuple[Floats, Floats]:
        """Posterior mean and variance [m] at `ahead`, by Gaussian conditioning (Rasmussen and
        Williams 2006, eq. 2.25 and 2.26). Without y the mean is zero: a design has a variance."""
        own = x is self.x and count is self.count
        inverse = self._inverse
        if not own:
            inverse = np.asarray(np.linalg.inv(self._covariance(x, count, steep)), np.float64)
        level, square, drift = self.prior.level**2, self._trend_sd**2, self._drift_sd**2
        # slope(x) = slope exp(-x / length) beyond the largest rung
        lasts = ahead < 0 or np.isinf(length)
        reach = ahead if lasts else -length * float(np.expm1(-ahead / length))
        cross = level + square[:, None] * reach * x + drift[:, None] * _both_sides(x, ahead)
        before = level + square * reach**2 + drift * abs(ahead) ** 3 / 3
        return self._condition(cross, before, inverse, y)

    def _condition(
        self, cross: Floats, before: Floats, inverse: Floats, y: Floats | None
    ) -> tuple[Floats, Floats]:
        pull = np.einsum("mk,mkj->mj", cross, inverse)
        variance = np.maximum(before - np.einsum("mj,mj->m", pull, cross), 1e-12)
        if y is None:
            return np.zeros_like(variance), variance
        return np.einsum("mj,mj->m", pull, self._repeated(y)), variance

    def _mixture(self, mean: Floats, variance: Floats) -> Mixture:
        sd = np.sqrt(variance)[:, None]
        return Mixture(weight=self.weight, mean=mean[:, None], sd=sd).prune()

    @cached_property
    def _inverse(self) -> Floats:
        covariance = self._covariance(self.x, self.count, self.steep)
        return np.asarray(np.linalg.inv(covariance), np.float64)

    def _covariance(self, x: Floats, count: Floats, steep: Floats) -> Floats:
        """[m, k, k] of the rungs' means."""
        line = self.prior.level**2 + (self._trend_sd**2)[:, None, None] * np.outer(x, x)
        line = line + (self._drift_sd**2)[:, None, None] * integrated(x)
        each = self._nodes[1][:, None] ** 2 + self.noise[:, None] ** 2 / count
        own = self._repeated(steep) ** 2 * each
        return line + own[:, :, None] * np.eye(x.size)

    @cached_property
    def _nodes(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Noise, error of a rung, sd of the trend and of its drift, each [m]; those of a draw are
        together."""
        pairs = np.array(self.prior.trend)
        at = np.indices((NOISE.size, RUNG.size, len(pairs))).reshape(3, -1)
        noise, rung, pair = np.tile(at, len(self.y))
        return NOISE[noise], RUNG[rung], pairs[pair, 0], pairs[pair, 1]

    @property
    def _trend_sd(self) -> Floats:
        return self._nodes[2]

    @property
    def _drift_sd(self) -> Floats:
        return self._nodes[3]

    def _repeated(self, values: Floats) -> Floats:
        """[m, ...] of [draws, ...]."""
        return np.repeat(values, self.noise.size // len(self.y), axis=0)


def _both_sides(x: Floats, ahead: float) -> Floats:
    """[k] covariance of two-sided integrated Brownian motion between x <= 0 and `ahead`."""
    if ahead >= 0:
        return np.zeros_like(x)
    return integrated(np.append(x, ahead))[-1, :-1]
