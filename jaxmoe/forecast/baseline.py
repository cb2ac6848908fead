"""The usual laws, as they are usually fitted: what the forecast is measured against.

`TwoVariable` is E + A N^-a + B D^-b (Hoffmann et al. 2022, eq. 2) by variable projection: exponents
on a grid, E, A, B by non-negative least squares of relative residuals, reweighted to a Huber loss,
runs weighted by compute. Its `bootstrap` resamples the runs: the interval that papers give.
`ComputeFloor` shows how little the floor of L(C) is identified.
"""

import itertools
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
        return TwoVariableFit(
            exponents=best[1], terms=best[2], noise=noise, points=points, weight=root**2
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoVariableFit:
    """Exponents [a, b] and terms [E, A, B] at N = 1e9 and D = 2e10, nats per token."""

    exponents: Floats
    terms: Floats
    noise: float  # relative, of the runs about the law
    points: Points  # that it saw
    weight: Floats  # [n] of each in the last fit: compute, and less of outliers

    def predict(self, target: Points) -> Floats:
        """[t] nats per token."""
        return _terms(target, *self.exponents) @ self.terms

    def bootstrap(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] predictions of the law fitted again to runs drawn with replacement.

        Exponents and terms are found anew for each draw; the robust weights are kept.
        """
        points = self.points
        drawn = rng.multinomial(len(points), np.full(len(points), 1 / len(points)), size=n)
        pairs = [(a, b) for a in EXPONENTS for b in EXPONENTS]
        weight = drawn * self.weight
        best, predicted = np.full(n, np.inf), np.zeros((n, len(target)))
        for a, b in pairs:
            rows = _terms(points, a, b) / points.loss[:, None]
            square = np.einsum("rn,np,nq->rpq", weight, rows, rows, optimize=True)
            terms, error = _non_negative(square, weight @ rows, weight.sum(1))
            better = error < best
            best = np.where(better, error, best)
            predicted[better] = terms[better] @ _terms(target, a, b).T
        return predicted

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


def _non_negative(square: Floats, pull: Floats, total: Floats) -> tuple[Floats, Floats]:
    """Non-negative least squares of r small problems at once, by trying every set of terms.

    Args:
        square: [r, p, p] X'WX, and pull: [r, p] X'Wy, and total: [r] y'Wy.

    Returns:
        Terms [r, p] and squared errors [r].
    """
    count, width = pull.shape
    best, terms = np.full(count, np.inf), np.zeros((count, width))
    ridge = 1e-12 * np.trace(square, axis1=1, axis2=2)[:, None, None]  # draws of one run alone
    for chosen in itertools.product([False, True], repeat=width):
        at = np.flatnonzero(chosen)
        part = square[:, at[:, None], at] + ridge * np.eye(at.size)
        found = np.linalg.solve(part, pull[:, at, None])[:, :, 0]
        error = total - np.einsum("rp,rp->r", found, pull[:, at])
        better = (found >= 0).all(1) & (error < best)
        best = np.where(better, error, best)
        terms[better] = 0.0
        terms[np.ix_(better, at)] = found[better]
    return terms, best


def _terms(points: Points, a: float, b: float) -> Floats:
    n = np.log(points.params_active / REFERENCE_N)
    d = np.log(points.effective_tokens / REFERENCE_D)
    return np.stack([np.ones(len(points)), np.exp(-a * n), np.exp(-b * d)], 1)
