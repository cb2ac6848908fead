"""The usual laws, as they are usually fitted: what the forecast is measured against.

`TwoVariable` is E + A N^-a + B D^-b (Hoffmann et al. 2022, eq. 2) by variable projection: exponents
on a grid, E, A, B by non-negative least squares of relative residuals, reweighted to a Huber loss,
runs weighted by compute. `ComputeFloor` shows how little the floor of L(C) is identified.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.special import logsumexp

from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import REFERENCE_D, REFERENCE_N
from jaxmoe.forecast.points import Points, refuse_thin

__all__ = ["ComputeFloor", "TwoVariable", "TwoVariableFit", "compute_floor"]

EXPONENTS = np.linspace(0.2, 0.5, 9)  # unbounded ones give 2 to 6 % where this gives 1.3 to 3.4 %
HUBER = 1e-3
REWEIGHTINGS = 3
FLOOR_EXPONENTS = np.linspace(0.02, 0.6, 117)


@dataclass(frozen=True, kw_only=True)
class TwoVariable:
    """`power` of compute in the weights: 1 is proportional, 0 unweighted."""

    power: float = 1.0
    name: str = "two-variable, compute-weighted"

    def fit(self, points: Points) -> "TwoVariableFit":
        """Raises UserError where the runs are too few or too alike."""
        refuse_thin(points)
        weight = (points.flops / points.flops.max()) ** self.power
        root = np.sqrt(weight)
        best: tuple[float, Floats, Floats, Floats] | None = None
        for _ in range(REWEIGHTINGS):
            best = None
            for a in EXPONENTS:
                for b in EXPONENTS:
                    rows = _terms(points, a, b) / points.loss[:, None]
                    terms, error = nnls(rows * root[:, None], root)
                    if best is None or error < best[0]:
                        best = (error, np.array([a, b]), terms, rows @ terms - 1.0)
            assert best is not None
            size = np.maximum(np.abs(best[3]), 1e-12)
            root = np.sqrt(weight * np.minimum(1.0, HUBER / size))
        assert best is not None
        noise = float(np.sqrt(np.average(best[3] ** 2, weights=weight)))
        return TwoVariableFit(exponents=best[1], terms=best[2], noise=noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoVariableFit:
    """Exponents [a, b] and terms [E, A, B] at N = 1e9 and D = 2e10, nats per token."""

    exponents: Floats
    terms: Floats
    noise: float  # relative, of the runs about the law

    def predict(self, target: Points) -> Floats:
        """[t] nats per token."""
        return _terms(target, *self.exponents) @ self.terms

    def sample(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] the law with the in-sample noise alone: what a usual interval leaves out."""
        path = self.predict(target)
        return path * (1.0 + self.noise * rng.standard_normal((n, path.size)))


@dataclass(frozen=True, kw_only=True)
class ComputeFloor:
    """The floor c of L = a C^-b + c, three ways. Losses in nats per token.

    Attributes:
        free: c and b of the least squares.
        profiled: mean of c under its profile likelihood, and its 5 % and 95 % points.
        pinned: b when c is pinned at `pinned_at`.
        forecasts: of the target by each, if there is one: free, profiled, pinned.
    """

    free: tuple[float, float]
    profiled: tuple[float, float, float]
    pinned_at: float
    pinned: float
    forecasts: tuple[float, float, float] | None


def compute_floor(
    points: Points, target_flops: float | None = None, *, pinned_at: float = 1.69
) -> ComputeFloor:
    """Free, profiled and pinned floors of L(C), by variable projection over b.

    Raises:
        UserError: the runs are too few or too alike.
    """
    refuse_thin(points)
    x = np.log(points.flops / points.flops.max())
    y, weight = points.loss, points.flops / points.flops.max() / points.loss**2
    floors, slopes, sums = [], [], []
    for b in FLOOR_EXPONENTS:
        rows = np.stack([np.ones(y.size), np.exp(-b * x)], 1)
        root = np.sqrt(weight)
        terms, error = nnls(rows * root[:, None], y * root)
        floors.append(terms[0])
        slopes.append(terms[1])
        sums.append(max(error**2, 1e-12))
    floor, slope, square = np.array(floors), np.array(slopes), np.array(sums)
    # The noise is profiled too: the likelihood is the residual sum to the power -n / 2, and n is
    # the sum of weights, because a weight of 0.01 is a hundredth of a run.
    effective = max(float(np.sum(points.flops / points.flops.max())), 2.0)
    log = -0.5 * effective * np.log(square)
    share = np.exp(log - np.asarray(logsumexp(log)))
    order = np.argsort(floor)
    steps = np.cumsum(share[order])
    low, high = (float(floor[order][np.searchsorted(steps, q)]) for q in (0.05, 0.95))
    best = int(np.argmin(square))
    pin = min(pinned_at, 0.98 * float(y.min()))
    root = np.sqrt(weight) * y / (y - pin)
    fit = np.polyfit(x, np.log(y - pin), 1, w=root / (y / (y - pin)) ** 2)
    forecasts = None
    if target_flops is not None:
        ahead = float(np.log(target_flops / points.flops.max()))
        each = floor + slope * np.exp(-FLOOR_EXPONENTS * ahead)
        forecasts = (
            float(each[best]),
            float(share @ each),
            float(pin + np.exp(np.polyval(fit, ahead))),
        )
    return ComputeFloor(
        free=(float(floor[best]), float(FLOOR_EXPONENTS[best])),
        profiled=(float(share @ floor), low, high),
        pinned_at=pin,
        pinned=float(-fit[0]),
        forecasts=forecasts,
    )


def _terms(points: Points, a: float, b: float) -> Floats:
    n = np.log(points.params_active / REFERENCE_N)
    d = np.log(points.effective_tokens / REFERENCE_D)
    return np.stack([np.ones(len(points)), np.exp(-a * n), np.exp(-b * d)], 1)
