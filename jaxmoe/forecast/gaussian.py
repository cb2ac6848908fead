"""Laws that are linear once their exponents are fixed, over a grid of exponents and noises.

For each node of the grid the coefficients have a Gaussian prior and the errors are Gaussian, so the
posterior, the evidence and the prediction are closed formulas (Bishop 2006, section 3.3); the grid
is then weighed by evidence. That is variable projection (Golub and Pereyra 1973) with every
constant marginalised instead of maximised: no start point, no local optimum, the same bits always.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, ndtri

from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.mixture import Mixture

__all__ = ["Design", "Noise", "Posterior", "nodes", "solve"]


def nodes(mean: float, sd: float, count: int) -> Floats:
    """[count] equally likely nodes of a normal distribution: its quantiles at (i + 1/2) / count."""
    return mean + sd * ndtri((np.arange(count) + 0.5) / count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """Features of a law at n observed and t wanted runs, for g exponents and p coefficients.

    Attributes:
        seen: [g, n, p], and wanted: [g, t, p], in units of `scale`.
        mean: [p], and covariance: [p, p], of the coefficients' prior.
        scale: nats per token; the losses are divided by it.
    """

    seen: Floats
    wanted: Floats
    mean: Floats
    covariance: Floats
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """Errors in units of the scale: wander^2 * seen + level^2 * diag(spread), for s pairs.

    Attributes:
        wander, level: [s].
        seen: [n, n], and wanted: [t], variance of the law's own error at wander 1.
        spread: [n], and spread_wanted: [t], variance of a run's noise at level 1.
    """

    wander: Floats
    level: Floats
    seen: Floats
    wanted: Floats
    spread: Floats
    spread_wanted: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """Weights [s * g] of the nodes, coefficients [s * g, p], predictions in nats per token.

    A node's coefficients have posterior mean `coefficients` and covariance [s * g, p, p], in units
    of the design's scale.
    """

    weight: Floats
    coefficients: Floats
    covariance: Floats
    prediction: Mixture
    fitted: Floats  # [n] posterior mean at the observed runs, nats per token
    level: float  # posterior root mean square of the noise level, a fraction of the scale


def solve(loss: Floats, design: Design, noise: Noise) -> Posterior:
    """The posterior over all nodes, given losses [n] in nats per token."""
    y = loss / design.scale
    grid, count, width = design.seen.shape
    covariance = (noise.wander**2)[:, None, None] * noise.seen
    covariance = covariance + (noise.level**2)[:, None, None] * np.diag(noise.spread)
    root = np.linalg.cholesky(covariance)
    stacked = np.concatenate(
        [design.seen.transpose(1, 0, 2).reshape(count, grid * width), y[:, None]], axis=1
    )
    white = np.linalg.solve(root, stacked[None])
    z = white[:, :, -1]
    x = white[:, :, :-1].reshape(len(root), count, grid, width).transpose(0, 2, 1, 3)
    prior = np.linalg.inv(design.covariance)
    precision = prior + x.transpose(0, 1, 3, 2) @ x
    pull = prior @ design.mean + np.einsum("sgnp,sn->sgp", x, z)
    mean = np.linalg.solve(precision, pull[..., None])[..., 0]
    inverse = np.asarray(np.linalg.inv(precision), np.float64)
    evidence = (
        -0.5 * ((z * z).sum(1)[:, None] - np.einsum("sgp,sgp->sg", pull, mean))
        - 0.5 * np.linalg.slogdet(precision)[1]
        - np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)[:, None]
    )
    weight = np.exp(evidence - logsumexp(evidence)).ravel()
    centre = np.einsum("gtp,sgp->sgt", design.wanted, mean)
    variance = np.einsum("gtp,sgpq,gtq->sgt", design.wanted, inverse, design.wanted)
    variance += ((noise.wander**2)[:, None] * noise.wanted)[:, None, :]
    variance += ((noise.level**2)[:, None] * noise.spread_wanted)[:, None, :]
    fitted = np.einsum("gnp,sgp->sgn", design.seen, mean).reshape(weight.size, count)
    return Posterior(
        weight=weight,
        coefficients=mean.reshape(weight.size, width),
        covariance=inverse.reshape(weight.size, width, width),
        prediction=Mixture(
            weight=weight,
            mean=design.scale * centre.reshape(weight.size, -1),
            sd=design.scale * np.sqrt(variance.reshape(weight.size, -1)),
        ).prune(),
        fitted=design.scale * (weight @ fitted),
        level=float(np.sqrt(weight @ np.repeat(noise.level**2, grid))),
    )
