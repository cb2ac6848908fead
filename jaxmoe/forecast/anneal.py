"""Loss curves of one model under different learning-rate schedules: fit some, predict the others.

    L(t) = c + A x - B D(t) x^depth,    x = S(t)^-alpha,    S = sum of relative learning rates

D adds up the drops of the rate, eta_{j-1} - eta_j, each times a kernel of what came since:

    multi-power  1 - (1 + r eta_j^-gamma (S(t) - S(j)))^-beta: Luo et al. 2025 (arXiv:2503.12811)
    lag          1 - exp(-(t - j) / tau), in steps: Tissue et al. 2024 (arXiv:2408.11029), whose
                 S2 with momentum lambda = exp(-1 / tau) is the sum of this

Both papers subtract D as it is (depth 0), but what annealing gains shrinks as the run goes on:
depth 1 is a gain in proportion to what can still be reduced. A few curves do not tell the depth, so
`AnnealStack` takes the mean over it. c, A and B are projected out (non-negative least squares at a
fixed shape: variable projection) and the shape is found by least squares of relative residuals from
fixed starts; every curve weighs the same, outliers less (Huber loss at a scale that is learnt).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Ints, Run, Schedule

__all__ = ["DEPTHS", "KERNELS", "AnnealFit", "AnnealLaw", "AnnealStack", "AnnealStackFit"]

BLOCKS = 128  # pieces that the drops of a schedule are gathered in
OUTLIER = 4.0  # robust standard deviations from which on points weigh less (Huber)
SMALL = 1e-3  # relative; where residuals are this small the law errs, not the runs
PASSES = 4  # reweightings
MIN_POINTS = 12
WANDER = 0.002  # relative error per e-fold of S beyond the largest fitted
# Shapes: alpha, then log r, log beta, gamma; or log tau over the longest run
STARTS = {
    "multi-power": [[0.5, 3.0, -0.7, 0.5], [0.5, 6.0, -1.5, 1.0]],
    "lag": [[0.5, -3.5]],
}
BOUNDS = {
    "multi-power": [(0.05, 2.0), (-3.0, 13.0), (-3.0, 1.1), (-0.5, 2.5)],
    "lag": [(0.05, 2.0), (-7.0, 0.0)],
}
SIZES = {"multi-power": [0.1, 1.0, 0.3, 0.3], "lag": [0.1, 1.0]}  # of a step in each
EVALUATIONS = 100
KERNELS = tuple(STARTS)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class AnnealLaw:
    """`kernel` is one of KERNELS, `depth` at least 0."""

    kernel: str = "multi-power"
    depth: float = 0.5

    @property
    def name(self) -> str:
        return f"annealing {self.kernel} {self.depth:g}"

    def fit(self, runs: Sequence[Run]) -> "AnnealFit":
        """One model's runs under several schedules, each with its observations.

        Raises:
            UserError: an unknown kernel, or under MIN_POINTS observations after the warm-up.
        """
        if self.kernel not in KERNELS:
            raise UserError(f"kernel={self.kernel!r}: use one of {', '.join(KERNELS)}")
        tables, losses, weights = [], [], []
        span = float(max(run.schedule.steps for run in runs)) if runs else 1.0
        for run in runs:
            keep = run.steps > run.schedule.warmup_end
            if keep.any():
                tables.append(_Table.of(run.schedule, run.steps[keep], span))
                losses.append(run.loss[keep])
                weights.append(np.full(int(keep.sum()), 1.0 / keep.sum()))
        loss = np.concatenate(losses) if losses else np.zeros(0)
        if loss.size < MIN_POINTS:
            raise UserError(
                f"{loss.size} held-out losses after the warm-up cannot carry an annealing law; "
                f"give {MIN_POINTS} or more"
            )
        seen = _Seen(law=self, tables=tables, loss=loss, root=np.sqrt(np.concatenate(weights)))
        equal, shape = seen.root, seen.search(STARTS[self.kernel])
        for _ in range(PASSES):
            size = np.abs(seen.residual(shape))
            limit = OUTLIER * max(seen.scatter(shape), SMALL)
            if size.max() <= limit:
                break
            seen = replace(seen, root=equal * np.sqrt(np.minimum(1.0, limit / size)))
            shape = seen.search([shape])
        return AnnealFit(
            law=self,
            shape=shape,
            terms=seen.terms(shape),
            noise=max(seen.scatter(shape), 1e-5),
            span=span,
            last=max(float(t.total[-1]) for t in tables),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnealFit:
    """Shape parameters and [c, A, B] of a law."""

    law: AnnealLaw
    shape: Floats
    terms: Floats
    noise: float  # relative, of one observation
    span: float  # steps of the longest run fitted, the unit of tau and of S
    last: float  # largest S fitted, over span

    def predict(self, target: Run, steps: ArrayLike) -> Floats:
        """[k] the law at `steps` of the target's schedule; its observations are not read."""
        table = _Table.of(target.schedule, np.atleast_1d(np.asarray(steps)), self.span)
        return _features(self.law, self.shape, table) @ self.terms

    def sample(self, target: Run, steps: ArrayLike, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, k] draws: the law, an error that grows with log S, and observation noise."""
        at = np.atleast_1d(np.asarray(steps))
        path = self.predict(target, at)
        total = target.schedule.lr_sum(at) / self.span
        far = WANDER * np.maximum(np.log(total / self.last), 0.0) + self.noise
        own = self.noise * rng.standard_normal((n, at.size))
        return path * (1.0 + far * rng.standard_normal((n, 1)) + own)


@dataclass(frozen=True, kw_only=True)
class AnnealStack:
    """Multi-power laws of all DEPTHS, in equal shares: three curves do not tell them apart."""

    laws: tuple[AnnealLaw, ...] = field(
        default_factory=lambda: tuple(AnnealLaw(depth=depth) for depth in DEPTHS)
    )

    def fit(self, runs: Sequence[Run]) -> "AnnealStackFit":
        """Raises UserError as `AnnealLaw.fit` does."""
        return AnnealStackFit(fits=tuple(law.fit(runs) for law in self.laws))


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnealStackFit:
    """Several fits of the same runs."""

    fits: tuple[AnnealFit, ...]

    def predict(self, target: Run, steps: ArrayLike) -> Floats:
        """[k] mean of the fits, nats per token; the target's observations are not read."""
        return np.mean([fit.predict(target, steps) for fit in self.fits], axis=0)

    def sample(self, target: Run, steps: ArrayLike, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, k] draws, each of one fit: they part where the fits do."""
        drawn = [fit.sample(target, steps, n=n, rng=rng) for fit in self.fits]
        return np.stack(drawn)[rng.integers(len(drawn), size=n), np.arange(n)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """The observations [n] of all runs, and the root of their weights."""

    law: AnnealLaw
    tables: list["_Table"]
    loss: Floats
    root: Floats

    def rows(self, shape: Floats) -> Floats:
        """[n, 3] features over the loss."""
        parts = [_features(self.law, shape, table) for table in self.tables]
        return np.concatenate(parts) / self.loss[:, None]

    def terms(self, shape: Floats) -> Floats:
        """[3] best c, A and B, none below 0."""
        return nnls(self.rows(shape) * self.root[:, None], self.root)[0]

    def residual(self, shape: Floats) -> Floats:
        """[n] relative, not weighted."""
        rows = self.rows(shape)
        return rows @ nnls(rows * self.root[:, None], self.root)[0] - 1.0

    def scatter(self, shape: Floats) -> float:
        """Robust standard deviation of the residuals."""
        return 1.4826 * float(np.median(np.abs(self.residual(shape))))

    def search(self, starts: Sequence[ArrayLike]) -> Floats:
        """The best shape from any of the starts."""
        low, high = np.array(BOUNDS[self.law.kernel]).T
        found = [
            least_squares(
                lambda shape: self.root * self.residual(shape),
                start,
                bounds=(low, high),
                x_scale=SIZES[self.law.kernel],
                max_nfev=EVALUATIONS,
            )
            for start in starts
        ]
        return np.asarray(min(found, key=lambda r: r.cost).x, np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """What the kernels read of a schedule at k observations and b blocks of drops."""

    step: Floats  # [k] over span
    total: Floats  # [k] S over span
    drop: Floats  # [b] sum of the drops in the block
    at: Floats  # [b] step of the block's drops over span
    after: Floats  # [b] S there, over span
    rate: Floats  # [b] rate after it

    @classmethod
    def of(cls, schedule: Schedule, steps: Ints, span: float) -> "_Table":
        rate = schedule.annealing
        fall = -np.diff(rate, prepend=rate[0])
        where = np.flatnonzero(fall)
        total = np.cumsum(schedule.progress)
        block = np.unique(np.linspace(0, where.size, min(BLOCKS, where.size) + 1).astype(int))
        parts = [where[a:b] for a, b in zip(block[:-1], block[1:], strict=True)]
        centre = np.array([np.average(p, weights=np.abs(fall[p])) for p in parts])
        middle = centre.round().astype(int)
        ends = np.array([p[-1] for p in parts], dtype=int)
        index = schedule.index(steps)
        return cls(
            step=np.asarray((index + 1.0) / span, np.float64),
            total=total[index] / span,
            drop=np.array([fall[p].sum() for p in parts]),
            at=centre / span,
            after=total[middle] / span if parts else np.zeros(0),
            rate=np.maximum(rate[ends], 1e-4) if parts else np.zeros(0),
        )


def _features(law: AnnealLaw, shape: Floats, t: _Table) -> Floats:
    """[k, 3] what c, A and B multiply."""
    if law.kernel == "lag":
        since = np.maximum(t.step[:, None] - t.at, 0.0)
        gain = -np.expm1(-since / np.exp(shape[1]))
    else:
        since = np.maximum(t.total[:, None] - t.after, 0.0)
        grown = 1.0 + np.exp(shape[1]) * t.rate ** -shape[3] * since
        gain = 1.0 - grown ** -np.exp(shape[2])
    x = t.total ** -shape[0]
    return np.stack([np.ones(x.size), x, -(gain @ t.drop) * x**law.depth], 1)
