"""Loss curves of one model under different learning-rate schedules: fit some, predict the others.

    L(t) = (c + A S(t)^-alpha) * (1 - B * D(t)),    S = sum of relative learning rates

D adds up the drops of the rate, eta_{j-1} - eta_j, each times a kernel of what came since:

    lag          1 - exp(-(t - j) / tau), in steps: Tissue et al. 2024 (arXiv:2408.11029), whose
                 S2 with momentum lambda = exp(-1 / tau) is the sum of this
    multi-power  1 - (1 + r eta_j^-gamma (S(t) - S(j)))^-beta: Luo et al. 2025 (arXiv:2503.12811)

Both papers subtract D; here it multiplies, as in `laws.py`: what annealing gains shrinks with the
loss, and a long cosine is overestimated otherwise. c and A are projected out (least squares at
fixed shape, variable projection), the shape is found by Nelder-Mead from fixed starts on a Huber
loss of relative residuals, every curve weighing the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Ints, Run, Schedule

__all__ = ["KERNELS", "AnnealFit", "AnnealLaw", "AnnealStack"]

BLOCKS = 512  # pieces that the drops of a schedule are gathered in
HUBER = 1e-3  # relative residual from which on points weigh less
PROJECTIONS = 4  # reweightings for the Huber loss
MIN_POINTS = 12
WANDER = 0.002  # relative error per e-fold of S beyond the largest fitted
# Shapes: alpha, log B, then log tau over the longest run; or log r, beta, gamma
STARTS = {"lag": [[0.5, -3.0, -3.5]], "multi-power": [[0.5, -3.0, 3.0, 0.5, 0.5]]}
BOUNDS = {
    "lag": [(0.05, 2.0), (-6.0, 1.0), (-7.0, 0.0)],
    "multi-power": [(0.05, 2.0), (-6.0, 1.0), (-3.0, 13.0), (0.05, 3.0), (-0.5, 2.0)],
}
KERNELS = tuple(STARTS)


@dataclass(frozen=True, kw_only=True)
class AnnealLaw:
    """`kernel` is one of KERNELS."""

    kernel: str = "lag"

    @property
    def name(self) -> str:
        return f"annealing {self.kernel}"

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
        weight = np.concatenate(weights)
        shape = self._search(tables, loss, weight)
        terms, residual = _project(self.kernel, shape, tables, loss, weight)
        noise = 1.4826 * float(np.median(np.abs(residual)))
        last = max(float(t.total[-1]) for t in tables)
        return AnnealFit(
            law=self, shape=shape, terms=terms, noise=max(noise, 1e-5), span=span, last=last
        )

    def _search(self, tables: list["_Table"], loss: Floats, weight: Floats) -> Floats:
        low, high = np.array(BOUNDS[self.kernel]).T

        def cost(shape: Floats) -> float:
            inside = np.clip(shape, low, high)
            _, residual = _project(self.kernel, inside, tables, loss, weight)
            size = np.abs(residual)
            huber = np.where(size < HUBER, 0.5 * size**2, HUBER * (size - HUBER / 2))
            return float(np.sum(weight * huber) * 1e6 + np.sum((shape - inside) ** 2))

        options = {"maxiter": 600, "xatol": 1e-3, "fatol": 1e-6}
        found = [
            minimize(cost, start, method="Nelder-Mead", options=options)
            for start in STARTS[self.kernel]
        ]
        return np.clip(min(found, key=lambda r: r.fun).x, low, high)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnealFit:
    """Shape parameters and [c, A] of a law."""

    law: AnnealLaw
    shape: Floats
    terms: Floats
    noise: float  # relative, of one observation
    span: float  # steps of the longest run fitted, the unit of tau and of S
    last: float  # largest S fitted, over span

    def predict(self, target: Run, steps: ArrayLike) -> Floats:
        """[k] the law at `steps` of the target's schedule; its observations are not read."""
        table = _Table.of(target.schedule, np.atleast_1d(np.asarray(steps)), self.span)
        return _features(self.law.kernel, self.shape, table) @ self.terms

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
    """The mean of both kernels' predictions: on three curves no backtest can tell them apart."""

    laws: tuple[AnnealLaw, ...] = field(
        default_factory=lambda: tuple(AnnealLaw(kernel=k) for k in KERNELS)
    )

    def fit(self, runs: Sequence[Run]) -> tuple[AnnealFit, ...]:
        return tuple(law.fit(runs) for law in self.laws)


def predict_mean(fits: Sequence[AnnealFit], target: Run, steps: ArrayLike) -> Floats:
    """[k] mean of several fits."""
    return np.mean([fit.predict(target, steps) for fit in fits], axis=0)


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


def _features(kernel: str, shape: Floats, t: _Table) -> Floats:
    """[k, 2] what c and A multiply."""
    if kernel == "lag":
        since = np.maximum(t.step[:, None] - t.at, 0.0)
        gain = -np.expm1(-since / np.exp(shape[2]))
    else:
        since = np.maximum(t.total[:, None] - t.after, 0.0)
        gain = 1.0 - (1.0 + np.exp(shape[2]) * t.rate ** -shape[4] * since) ** -shape[3]
    annealed = 1.0 - np.exp(shape[1]) * (gain @ t.drop)
    return np.stack([annealed, annealed * t.total ** -shape[0]], 1)


def _project(
    kernel: str, shape: Floats, tables: list[_Table], loss: Floats, weight: Floats
) -> tuple[Floats, Floats]:
    """[2] least-squares c and A under the Huber loss, and the relative residuals [n]."""
    rows = np.concatenate([_features(kernel, shape, t) for t in tables]) / loss[:, None]
    root = np.sqrt(weight)
    terms, residual = np.zeros(2), np.zeros(loss.size)
    for _ in range(PROJECTIONS):
        terms = np.linalg.lstsq(rows * root[:, None], root, rcond=None)[0]
        residual = rows @ terms - 1.0
        root = np.sqrt(weight * np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12)))
    return np.asarray(terms, np.float64), np.asarray(residual, np.float64)
