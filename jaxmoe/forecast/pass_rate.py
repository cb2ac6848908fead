"""Pass rates over compute: -E[log pass rate] = alpha C^-k on buckets of difficulty.

OpenAI's GPT-4 report (2023, arXiv:2303.08774, section 3.2) forecast HumanEval so; its problem is
that one task never solved makes the mean infinite. Here each task has a beta-binomial posterior:
the bucket shares a Beta(m s, (1 - m) s), fitted to its counts by maximum likelihood on a grid, and

    E[log p | k of n solved] = digamma(m s + k) - digamma(s + n)

is finite for a zero count. Its spread over tasks, and that of the prior, give each point's error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln, digamma, logsumexp, polygamma

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.mixture import Mixture
from jaxmoe.forecast.points import MIN_BUDGETS, MIN_DECADES

__all__ = ["PassFit", "PassLaw", "buckets", "mean_log_pass"]

MEANS = np.geomspace(1e-4, 0.999, 30)
STRENGTHS = np.geomspace(0.1, 100.0, 10)
EXPONENT = (np.log(0.25), 0.6)  # of C: k, log-normal
WANDER = 0.05  # error of log(-E log p) per e-fold of compute beyond the largest seen
NOISE = 0.05  # of log(-E log p) of one model, beside the binomial


def mean_log_pass(solved: ArrayLike, tries: ArrayLike) -> tuple[float, float]:
    """E[-log pass rate] of a bucket's tasks and its standard error.

    Args:
        solved, tries: [tasks] counts.

    Raises:
        UserError: no task, a count below 0, or more solved than tried.
    """
    k, n = np.atleast_1d(np.asarray(solved, float)), np.atleast_1d(np.asarray(tries, float))
    if k.shape != n.shape or not k.size:
        raise UserError(f"{k.size} counts of solved and {n.size} of tries; give one of each a task")
    wrong = np.flatnonzero((k < 0) | (k > n) | (n < 1) | ~np.isfinite(k + n))
    if wrong.size:
        raise UserError(f"task {wrong[0] + 1}: {k[wrong[0]]:g} solved of {n[wrong[0]]:g} tries")
    m, s = (g.ravel()[:, None] for g in np.meshgrid(MEANS, STRENGTHS))
    a, b = m * s, (1 - m) * s
    log = np.sum(betaln(a + k, b + n - k) - betaln(a, b), axis=1)
    weight = np.exp(log - logsumexp(log))
    each = digamma(s + n) - digamma(a + k)  # [grid, tasks] mean of -log p
    variance = polygamma(1, a + k) - polygamma(1, s + n)
    centre = each.mean(1)
    mean = float(weight @ centre)
    between = float(weight @ (centre - mean) ** 2)
    within = float(weight @ variance.sum(1)) / k.size**2
    return mean, float(np.sqrt(between + within))


def buckets(difficulty: ArrayLike, count: int) -> list[np.ndarray]:
    """Indices of tasks in `count` buckets of equal size by difficulty; ties stay in their order.

    The difficulty must come from the smallest model or from people, never from the target.
    """
    order = np.argsort(np.asarray(difficulty), kind="stable")
    if count < 1 or count > order.size:
        raise UserError(f"count={count} buckets of {order.size} tasks; use 1 to {order.size}")
    return [np.sort(part) for part in np.array_split(order, count)]


@dataclass(frozen=True, kw_only=True)
class PassLaw:
    """log(-E log p) = log alpha - k log C, Bayesian, over k log-normal and alpha flat."""

    name: str = "pass rate"

    def fit(
        self, flops: ArrayLike, solved: Sequence[ArrayLike], tries: Sequence[ArrayLike]
    ) -> "PassFit":
        """One bucket: models [n] of compute `flops`, each with its tasks' counts.

        Raises:
            UserError: under MIN_BUDGETS models, or MIN_DECADES of compute, or a compute that is
                not above 0.
        """
        c = np.atleast_1d(np.asarray(flops, np.float64))
        wrong = c[~(np.isfinite(c) & (c > 0))]
        if wrong.size:
            raise UserError(f"flops={wrong[0]:g}: each model needs a finite compute above 0")
        distinct = np.unique(c)
        if distinct.size < MIN_BUDGETS:
            raise UserError(
                f"{distinct.size} distinct compute budgets; a pass rate needs {MIN_BUDGETS}"
            )
        decades = float(np.log10(distinct[-1] / distinct[0]))
        if decades < MIN_DECADES:
            raise UserError(f"the models span {decades:.2f} decades; it needs {MIN_DECADES}")
        pairs = [mean_log_pass(k, n) for k, n in zip(solved, tries, strict=True)]
        value, error = np.array(pairs).T
        sd = np.hypot(error / value, NOISE)
        return PassFit(top=float(c.max()), x=np.log(c / c.max()), y=np.log(value), sd=sd)


@dataclass(frozen=True, kw_only=True, eq=False)
class PassFit:
    """Log of -E[log p] [n] at log compute over the largest [n], with its sd [n]."""

    top: float
    x: Floats
    y: Floats
    sd: Floats

    def mixture(self, flops: ArrayLike) -> Mixture:
        """Of log(-E[log p]) at each of `flops` [t]."""
        ahead = np.log(np.atleast_1d(np.asarray(flops, np.float64)) / self.top)
        rate = np.exp(nodes(*EXPONENT, 41))[:, None]
        precision = 1 / self.sd**2
        level = (self.y + rate * self.x) @ precision / precision.sum()
        residual = self.y + rate * self.x - level[:, None]
        log = -0.5 * np.sum(residual**2 * precision, axis=1)
        weight = np.exp(log - logsumexp(log))
        far = np.maximum(ahead, 0.0)
        sd = np.sqrt(1 / precision.sum() + (WANDER * far) ** 2 + NOISE**2)
        mean = level[:, None] - rate * ahead
        return Mixture(weight=weight, mean=mean, sd=np.broadcast_to(sd, mean.shape))

    def predict(self, flops: ArrayLike) -> Floats:
        """[t] median of -E[log p]."""
        return np.exp(self.mixture(flops).predict())

    def quantile(self, flops: ArrayLike, levels: ArrayLike) -> Floats:
        """[q, t] quantiles of -E[log p]; exp(-x) is the geometric mean pass rate."""
        return np.exp(self.mixture(flops).quantile(levels))

    def sample(self, flops: ArrayLike, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of -E[log p]."""
        return np.exp(self.mixture(flops).sample(n, rng))
