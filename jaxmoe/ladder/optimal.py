"""Compute-optimal sizes for a budget, from the posterior of L(N, D).

Hoffmann et al. 2022, approach 3: the N that minimises L(N, D) at N D = C / c. Here for draws of the
posterior of each law over N and D (exponents, sizes of the terms, noise), so that what the ladder
does not tell stays wide. c = C / (N D) counts attention: it is taken from the largest rung.
"""

from dataclasses import dataclass

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import DenseFit
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.stack import StackFit

__all__ = ["ONE_LINE", "Optimum", "optimal_sizes"]

DRAWS = 4000
ENOUGH = 0.05  # of the draws, that must be laws
GRID = 241  # sizes; over SPAN on either side of the ladder's own line
SPAN = np.log(1e4)
ONE_LINE = 0.1  # spread of log(D / N) off one line, under which data say nothing of the optimum


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Quantiles 5, 50 and 95 % over the posterior.

    Attributes:
        params_active, tokens: of the best run; counts.
        loss: of the best run, nats per token, the laws alone.
        from_prior: the ladder's runs lie on one line of D over N: the split is the prior's.
    """

    flops: float
    params_active: tuple[float, float, float]
    tokens: tuple[float, float, float]
    loss: tuple[float, float, float]
    from_prior: bool


def optimal_sizes(points: Points, fit: StackFit, budget: float, *, seed: int = 0) -> Optimum:
    """The best N and D for `budget` FLOPs.

    Raises:
        UserError: the budget is not a positive number, no law over N and D was fitted, or its
            posterior is mostly none (negative terms).
    """
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"--budget {budget}: it must be a finite number above 0")
    split = [i for i, one in enumerate(fit.fits) if one.law.name != "compute"]
    weight = fit.weight[split] / fit.weight[split].sum() if split else np.zeros(0)
    if not split or not np.all(np.isfinite(weight)):
        raise UserError("no law over parameters and tokens; an optimum needs one")
    top = int(np.argmax(points.flops))
    each = float(points.flops[top] / (points.params_active[top] * points.tokens[top]))
    centre = 0.5 * np.log(budget / each * points.params_active[top] / points.tokens[top])
    sizes = np.exp(np.linspace(centre - SPAN, centre + SPAN, GRID))
    target = Points.of(sizes, budget / each / sizes, flops=np.full(GRID, budget))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(DRAWS, weight)
    drawn = [
        _best(fit.fits[i], target, int(n), rng) for i, n in zip(split, counts, strict=True) if n
    ]
    best, loss = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    if best.size < ENOUGH * DRAWS:
        raise UserError(
            f"--budget {budget:g}: the runs do not tell parameters from tokens; add rungs,"
            " seeds, or --horizons off the ladder's line"
        )
    return Optimum(
        flops=budget,
        params_active=_three(best),
        tokens=_three(budget / each / best),
        loss=_three(loss),
        from_prior=fit.spread < ONE_LINE,
    )


def _best(
    fit: DenseFit, target: Points, count: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """[count] sizes and [count] losses of the minimum over the target's sizes."""
    paths = fit.curves(target, n=count, rng=rng)
    at = np.argmin(paths, axis=1)
    least = paths[np.arange(count), at]
    # The terms of a law are positive, but their posterior is normal: a draw with a negative one has
    # its minimum at an end, or below zero.
    real = (at > 0) & (at < GRID - 1) & (least > 0)
    sizes = _vertex(np.log(target.params_active), paths[real], at[real])
    return np.exp(sizes), least[real]


def _vertex(x: Floats, paths: Floats, at: np.ndarray) -> Floats:
    """The minimum of the parabola through the least value and its neighbours; [count] of x."""
    inner = np.clip(at, 1, x.size - 2)
    rows = np.arange(len(paths))
    left, middle, right = (paths[rows, inner + n] for n in (-1, 0, 1))
    bend = left - 2 * middle + right
    step = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    return np.where(inner == at, x[inner] + np.clip(step, -1, 1) * (x[1] - x[0]), x[at])


def _three(values: Floats) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return float(low), float(middle), float(high)
