"""The path of a run that has not begun, from the curves of a ladder and a forecast of its end.

At a share f of its tokens each sibling i still had y_i = log(log(L_i(f) / L_i(end))) to fall, the
remaining fall that `siblings` regresses; here on log N alone, as the target has no curve yet:

    y_i = y - (integral of beta from log N_i to log N) + error

with a slope beta of which a part lasts and a part is forgotten beyond the largest sibling (LENGTH),
as much of each as the siblings say: models under 1e5 parameters keep falling for longer the larger
they are, and then no more. The target's loss at f is L(end) exp(exp(y)), with L(end) drawn from the
forecast of its end.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

from jaxmoe.forecast.curve import Floats, Run, Schedule
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.hook_api import SAMPLES, PathPoint, Quantiles, named
from jaxmoe.forecast.siblings import Constants

__all__ = ["LEVELS", "path_from_siblings", "shares"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
POINTS = 64  # of the path at most; between them it is read by straight lines
# e-folds of parameters over which a slope is forgotten: ladders on bytes have slopes of 0.2 to 0.4
# over their first e-fold and of 0 to 0.1 over the next (LOG.md, 2026-11-23).
LENGTH = 1.0
PASSING = (0.0, 0.15, 0.3)  # sd of the part of the slope that is forgotten, each as likely
EARLIEST = 0.02  # share of the tokens before which siblings tell little: warm-up, batch ramps


def path_from_siblings(
    siblings: Sequence[Run],
    schedule: Schedule,
    params_active: float,
    end: Floats,
    last: Quantiles,
    eval_steps: Sequence[int],
    after: int = 0,
) -> tuple[PathPoint, ...]:
    """Quantiles of the held-out loss at steps beyond `after`; the end alone without siblings.

    Args:
        end: [SAMPLES] draws of the loss at the end of `schedule`, and `last` their quantiles.
        eval_steps: steps at which the loss will be measured.
    """
    final = PathPoint(step=schedule.steps, **vars(last))
    usable = [run for run in siblings if run.params_active and run.loss.size > 1]
    if not usable:
        return (final,)
    curves = [(shares(run), np.log(run.loss)) for run in usable]
    first = max(EARLIEST, max(share[0] for share, _ in curves))
    start = max(after, schedule.warmup_end - 1)
    wanted = [s for s in eval_steps if start < s < schedule.steps]
    at = schedule.tokens[np.array(wanted, np.int64) - 1] / schedule.tokens[-1] if wanted else []
    steps = _thinned([s for s, f in zip(wanted, at, strict=True) if f >= first])
    rng = np.random.default_rng([0, 2])
    seed = Constants().seed * rng.standard_normal(SAMPLES)
    z = rng.standard_normal(SAMPLES)
    points = []
    sizes = np.log([run.params_active or 1.0 for run in usable]) - np.log(params_active)
    for step in steps:
        share = float(schedule.tokens[step - 1] / schedule.tokens[-1])
        fall = np.array([np.interp(np.log(share), np.log(x), y) - y[-1] for x, y in curves])
        falls = fall > 0
        if falls.any():
            mean, sd = _remaining(sizes[falls], np.log(fall[falls]))
            drawn = end * np.exp(np.exp(mean + sd * z) + seed)
            points.append(PathPoint(step=int(step), **named(np.quantile(drawn, LEVELS))))
    return (*points, final)


def shares(run: Run) -> Floats:
    """[n] of the run's tokens at each observation."""
    return run.schedule.tokens[run.steps - 1] / run.schedule.tokens[-1]


def _remaining(sizes: Floats, y: Floats) -> tuple[float, float]:
    """Mean and sd of y at log size 0, the priors and the noise being those of `siblings`."""
    k = Constants()
    noises = np.exp(nodes(np.log(k.noise), k.noise_sd, 6))
    grid = np.meshgrid(noises, k.drift * np.array([0.3, 1.0, 3.0]), PASSING)
    noise, drift, passing = (g.ravel() for g in grid)
    top = float(sizes.max())
    places = np.append(sizes, 0.0) - top  # of the siblings and the target
    lasting = k.level_sd**2 + k.beta_sd**2 * np.outer(places, places)
    shared = lasting + (passing**2)[:, None, None] * _integrated_slope(places)
    own = noise[:, None] ** 2 + (drift[:, None] * sizes) ** 2
    inverse = np.linalg.inv(shared[:, :-1, :-1] + own[:, :, None] * np.eye(y.size))
    residual = y - k.level - k.beta * places[:-1]
    pull = np.einsum("mj,mji->mi", shared[:, -1, :-1], inverse)
    mean = k.level + k.beta * places[-1] + pull @ residual
    explained = np.einsum("mi,mi->m", pull, shared[:, -1, :-1])
    variance = np.maximum(shared[:, -1, -1] - explained, 1e-12) + noise**2
    score = 0.5 * np.linalg.slogdet(inverse)[1]
    score -= 0.5 * np.einsum("i,mij,j->m", residual, inverse, residual)
    weight = np.exp(score - logsumexp(score))
    centre = float(weight @ mean)
    return centre, float(np.sqrt(weight @ (variance + mean**2) - centre**2))


def _integrated_slope(places: Floats) -> Floats:
    """[n, n] covariance of the integral from 0 of a stationary slope of variance 1 that is
    forgotten over LENGTH: an Ornstein-Uhlenbeck process (Gillespie 1996, eq. 2.21)."""
    t = places / LENGTH
    near, far = (op(abs(t)[:, None], abs(t)) for op in (np.minimum, np.maximum))
    one_side = 2 * near - 1 + np.exp(-near) + np.exp(-far) - np.exp(near - far)
    across = -np.outer(1 - np.exp(-abs(t)), 1 - np.exp(-abs(t)))
    return LENGTH**2 * np.where(np.outer(t, t) >= 0, one_side, across)


def _thinned(steps: Sequence[int]) -> list[int]:
    """At most POINTS: half of them evenly by step, half by its log, where the curve bends."""
    if len(steps) <= POINTS:
        return list(steps)
    last = len(steps) - 1
    even = np.linspace(0, last, POINTS // 2)
    bent = np.geomspace(1, last + 1, POINTS // 2) - 1
    return [steps[i] for i in sorted({*np.round(even).astype(int), *np.round(bent).astype(int)})]
