"""Predictive distributions as mixtures of Gaussians: quantiles, draws, scores."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, logsumexp, ndtr, ndtri_exp

from jaxmoe.forecast.curve import Floats

__all__ = ["Mixture", "combine"]

BISECTIONS = 40  # of 18 standard deviations: to 2e-11 of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """For each of t targets, a mixture of m Gaussians in nats per token.

    Attributes:
        weight: [m], sums to 1.
        mean, sd: [m, t].
    """

    weight: Floats
    mean: Floats
    sd: Floats

    def predict(self) -> Floats:
        """[t] medians."""
        return self.quantile([0.5])[0]

    def quantile(self, levels: ArrayLike) -> Floats:
        """[q, t] quantiles by bisection of the distribution function."""
        level = np.atleast_1d(np.asarray(levels, np.float64))[:, None]
        reach = 9.0 * self.sd
        low = np.broadcast_to((self.mean - reach).min(0), (level.size, self.mean.shape[1])).copy()
        high = np.broadcast_to((self.mean + reach).max(0), low.shape).copy()
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            below = self.cdf(middle) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return 0.5 * (low + high)

    def cdf(self, values: Floats) -> Floats:
        """[q, t] probability of at most `values` [q, t]."""
        z = (values[:, None, :] - self.mean) / self.sd
        return np.einsum("m,qmt->qt", self.weight, ndtr(z))

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws; the targets of one draw share their component, as they share the law."""
        which = rng.choice(self.weight.size, size=n, p=self.weight)
        return self.mean[which] + self.sd[which] * rng.standard_normal((n, self.mean.shape[1]))

    def log_score(self, outcome: Floats) -> Floats:
        """[t] log density of the outcomes [t]."""
        z = (outcome - self.mean) / self.sd
        with np.errstate(divide="ignore"):
            parts = np.log(self.weight)[:, None] - 0.5 * z**2 - np.log(self.sd)
        return np.asarray(logsumexp(parts, axis=0)) - 0.5 * np.log(2 * np.pi)

    def moments(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation, each [t]."""
        mean = self.weight @ self.mean
        return mean, np.sqrt(self.weight @ (self.sd**2 + self.mean**2) - mean**2)

    def calibrated(
        self, *, width: float, extra: ArrayLike, centre: Floats | None = None
    ) -> "Mixture":
        """Scaled by `width` about the median, plus an independent error of sd `extra` [t] nats.

        `centre` spares the search for the median where it is known.
        """
        centre = self.predict() if centre is None else centre
        sd = np.sqrt((width * self.sd) ** 2 + np.asarray(extra, np.float64) ** 2)
        return Mixture(weight=self.weight, mean=centre + width * (self.mean - centre), sd=sd)

    def prune(self, share: float = 1e-5) -> "Mixture":
        """Without the components that weigh under `share`; what is left sums to 1."""
        keep = self.weight >= share * self.weight.max()
        weight = self.weight[keep]
        return Mixture(weight=weight / weight.sum(), mean=self.mean[keep], sd=self.sd[keep])

    def surprise(self, outcome: Floats) -> Floats:
        """[t] standard normal score of the outcomes; positive: the loss came out above."""
        z = (outcome - self.mean) / self.sd
        with np.errstate(divide="ignore"):
            weight = np.log(self.weight)[:, None]
        lower = np.asarray(logsumexp(weight + log_ndtr(z), axis=0))
        upper = np.asarray(logsumexp(weight + log_ndtr(-z), axis=0))
        return np.where(lower < upper, ndtri_exp(lower), -ndtri_exp(upper))


def combine(parts: list[Mixture], weight: Floats) -> Mixture:
    """The mixture of mixtures over the same targets."""
    share = np.asarray(weight, np.float64) / np.sum(weight)
    return Mixture(
        weight=np.concatenate([w * p.weight for w, p in zip(share, parts, strict=True)]),
        mean=np.concatenate([p.mean for p in parts]),
        sd=np.concatenate([p.sd for p in parts]),
    )
