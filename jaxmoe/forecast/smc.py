"""A small tempered sequential Monte Carlo sampler (Del Moral, Doucet, Jasra 2006, section 3).

It moves a cloud of draws from a Gaussian prior to the posterior. No gradient and no start point
are needed, several modes are kept, and each stage is one vectorised call.
"""

from collections.abc import Callable

import numpy as np

from jaxmoe.forecast.curve import Floats

__all__ = ["sample_posterior"]

MOVES = 4  # Metropolis moves after each stage
LAST_MOVES = 12  # and after the last, so that the resampled copies part
MAX_STAGES = 60


def sample_posterior(
    log_likelihood: Callable[[Floats], Floats],
    *,
    mean: Floats,
    sd: Floats,
    particles: int,
    rng: np.random.Generator,
) -> Floats:
    """Draws [particles, d] from prior N(mean, sd^2) times the likelihood.

    Args:
        log_likelihood: [p, d] -> [p], finite or -inf.
        mean, sd: [d] of the independent Gaussian prior.
    """
    draws = mean + sd * _normal_scores(particles, len(mean), rng)
    score = _finite(log_likelihood(draws))
    power = 0.0
    for _ in range(MAX_STAGES):
        step = _next_step(score, 1.0 - power)
        power = power + step
        chosen = _resample(np.exp(step * (score - score.max())), rng)
        draws, score = draws[chosen], score[chosen]
        done = power >= 1.0 - 1e-9
        moves = LAST_MOVES if done else MOVES
        draws, score = _move(draws, score, log_likelihood, power, mean, sd, moves, rng)
        if done:
            break
    return draws


def _normal_scores(count: int, dim: int, rng: np.random.Generator) -> Floats:
    """Standard normal draws, centred and scaled exactly: less noise between seeds."""
    x = rng.standard_normal((count, dim))
    return (x - x.mean(0)) / x.std(0)


def _finite(score: Floats) -> Floats:
    return np.where(np.isfinite(score), score, -1e300)


def _next_step(score: Floats, left: float) -> float:
    """The largest power step that keeps half the effective sample size."""

    def effective(step: float) -> float:
        w = np.exp(step * (score - score.max()))
        return float(w.sum() ** 2 / (w**2).sum() / len(w))

    if effective(left) >= 0.5:
        return left
    low, high = 0.0, left
    for _ in range(40):
        middle = 0.5 * (low + high) if low > 0 else high * 0.1
        low, high = (middle, high) if effective(middle) >= 0.5 else (low, middle)
        if low > 0 and high / low < 1.05:
            break
    return max(low, 1e-12)


def _resample(weight: Floats, rng: np.random.Generator) -> np.ndarray:
    """Systematic resampling: indices [p] in proportion to `weight`."""
    places = (np.arange(len(weight)) + rng.random()) / len(weight)
    return np.minimum(np.searchsorted(np.cumsum(weight / weight.sum()), places), len(weight) - 1)


def _move(
    draws: Floats,
    score: Floats,
    log_likelihood: Callable[[Floats], Floats],
    power: float,
    mean: Floats,
    sd: Floats,
    moves: int,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Random-walk Metropolis with the cloud's own covariance; the scale follows the acceptance."""
    count, dim = draws.shape
    root = np.linalg.cholesky(np.cov(draws.T) + 1e-8 * np.diag(sd**2))
    scale = 2.38 / np.sqrt(dim)
    for _ in range(moves):
        jump = rng.standard_normal((count, dim)) @ root.T
        proposal = draws + scale * jump
        proposed = _finite(log_likelihood(proposal))
        prior = 0.5 * (((draws - mean) / sd) ** 2 - ((proposal - mean) / sd) ** 2).sum(1)
        accept = np.log(rng.random(count)) < power * (proposed - score) + prior
        draws = np.where(accept[:, None], proposal, draws)
        score = np.where(accept, proposed, score)
        scale *= np.exp(accept.mean() - 0.25)
    return draws, score
