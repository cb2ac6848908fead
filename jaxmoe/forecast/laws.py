"""Laws of the loss curve: what a fit is, and the first law, of one run under its schedule.

The law. With S the sum of relative learning rates, s = S(t) / S(cut-off) and e(t) the learning
rate passed through a first-order lag of `tau` steps (where the batch grows: S of rates times
B^1/2, e of rates over B^1/2, and tau in tokens; curve.py says why),

    L(t) = level * (1 - share + share * s^-alpha) * (1 - drop * (1 - e(t)))

The first factor is the power law in S of Tissue et al. 2024 (arXiv:2408.11029, eq. 1, `S1`) and of
Luo et al. 2025 (arXiv:2503.12811, eq. 1), written around the cut-off. The second is their annealing
term: a lag of the rate is the integral of Tissue's `S2` with momentum exp(-1/tau). Here it is
relative to the loss: so written, its size hardly depends on the data set (see PRIOR).

The law is wrong, as all are. Its error is a Gaussian process that is zero at the cut-off and
wanders from it in both directions: in log S as integrated Brownian motion (the slope drifts), in
the learning rate as Brownian motion (the shape of the annealing drifts). So old observations weigh
less, and the interval widens with the distance that is extrapolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import lfilter
from scipy.special import expit

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Ints, Run, Schedule
from jaxmoe.forecast.smc import sample_posterior

__all__ = ["PRIOR", "Fit", "Law", "Prior", "WithinRun", "WithinRunFit", "usable"]


class Fit(Protocol):
    """A law after it has seen runs. Losses are nats per token."""

    @property
    def law(self) -> str: ...

    def predict(self, target: Run, steps: ArrayLike) -> Floats:
        """Median path [k] at `steps` of the target's schedule; its observations are not read."""
        ...

    def sample(self, target: Run, steps: ArrayLike, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, k] joint draws of what would be *measured*: law, its error, and observation noise."""
        ...


class Law(Protocol):
    """Something that can be fitted to runs; most laws take many, `WithinRun` exactly one."""

    @property
    def name(self) -> str: ...

    def fit(self, runs: Sequence[Run], *, seed: int) -> Fit: ...


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Mean and standard deviation of a parameter's transform (log, or logit for `share`)."""

    mean: float
    sd: float


# Evidence: fits of whole curves of public runs (MultiPowerLaw, OLMo-ladder, gemstones, Clark et al.
# MoE, modded-nanogpt) and of 1,000-step runs on a CPU; the ranges are of medians of sets. `wander`
# and ANNEAL_WANDER were set by the coverage of forecasts made at 20 to 85 % of those runs.
PRIOR: dict[str, Prior] = {
    "level": Prior(mean=0.0, sd=0.05),  # log of the law at the cut-off over the loss seen there
    "share": Prior(mean=-0.7, sd=1.4),  # reducible part at the cut-off: 0.05 (late) to 0.85
    "alpha": Prior(mean=np.log(0.35), sd=0.5),  # 0.2 to 0.9; runs of 1,000 steps 0.1 to 0.4
    "drop": Prior(mean=np.log(0.047), sd=0.42),  # sets 0.035 to 0.057; noisy small batches to 0.12
    "tau": Prior(mean=np.log(0.03), sd=1.0),  # over the run's tokens: 0.002 to 0.13
    "noise": Prior(mean=np.log(0.002), sd=0.8),  # over the loss: 0.0003 to 0.005
    "wander": Prior(mean=np.log(0.2), sd=0.4),  # of the slope, over one e-fold of S
}
NAMES = tuple(PRIOR)
MIN_POINTS = 3
MAX_POINTS = 64  # more are averaged in equal bins of log S, which keeps a fit at a fixed cost
SETTLING = 2.0  # warm-ups; the law errs by wander * slope once S has come so far, then as S^-2
SPAN = 16.0  # observations with S below S(cut-off) / SPAN are left out: another regime
ANNEAL_WANDER = 0.35  # of `drop`, for the learning rate going from 1 to 0, at the prior `wander`
TAUS = np.geomspace(0.001, 1.0, 24)  # over the run's tokens
GRID = 4096  # blocks that a longer schedule is averaged in before it is lagged
PARTICLES = 512


@dataclass(frozen=True, kw_only=True)
class WithinRun:
    """The schedule-aware law of one run. Observations in the warm-up are left out."""

    name: str = "within-run-v1"

    def fit(self, runs: Sequence[Run], *, seed: int = 0) -> "WithinRunFit":
        """Posterior draws of the law's parameters; deterministic for a seed.

        Raises:
            UserError: not exactly one run, or under MIN_POINTS observations after the warm-up.
        """
        if len(runs) != 1:
            raise UserError(
                f"{self.name} is a law of one run and got {len(runs)}; fit them one by one"
            )
        seen = _observe(runs[0])
        mean = np.array([PRIOR[k].mean for k in NAMES])
        sd = np.array([PRIOR[k].sd for k in NAMES])
        draws = sample_posterior(
            lambda x: _log_likelihood(x, seen),
            mean=mean,
            sd=sd,
            particles=PARTICLES,
            rng=np.random.default_rng(seed),
        )
        return WithinRunFit(law=self.name, seen=seen, draws=draws)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the likelihood needs of the observations (n of them, after binning)."""

    cutoff: int  # step
    lr_sum: float  # S at the cut-off
    lr: float  # annealed rate at the cut-off
    scale: float  # nats per token, the loss near the cut-off
    slope: float  # |d loss / d log S| near the cut-off
    horizon: int  # the unit of tau: tokens of the schedule in steps of its largest batch
    log_s: Floats  # [n] log of S over S(cut-off)
    lag: Floats  # [n, len(TAUS)]
    loss: Floats  # [n]
    weight: Floats  # [n] square root of the number of observations in a bin
    basis: Floats  # [n, n] eigenvectors of the weighted error covariance
    variance: Floats  # [n] its eigenvalues, nats^2 at wander 1


@dataclass(frozen=True, kw_only=True, eq=False)
class WithinRunFit:
    """Posterior draws [PARTICLES, len(PRIOR)] and the cut-off they are anchored at."""

    law: str
    seen: Seen
    draws: Floats

    def parameters(self) -> dict[str, Floats]:
        """Draws in natural units: nats, fractions, exponents; `tau` in steps of the
        largest batch."""
        p = dict(zip(NAMES, np.exp(self.draws).T, strict=True))
        share = expit(self.draws[:, NAMES.index("share")])
        seen = self.seen
        return {
            **p,
            "share": share,
            "level": p["level"] * seen.scale,
            "tau": p["tau"] * seen.horizon,
        }

    def predict(self, target: Run, steps: ArrayLike) -> Floats:
        """Median path [k] in nats per token; the law's error and the noise are centred on zero."""
        return np.median(self.paths(target, steps), axis=0)

    def sample(self, target: Run, steps: ArrayLike, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, k] draws of measured losses.

        The law's error at and before the cut-off is drawn from its prior around the law, not
        conditioned on the residuals seen there: samples are meant for what is still to come.
        """
        schedule, seen = target.schedule, self.seen
        who = rng.permutation(np.arange(n) % len(self.draws))
        path = self.paths(target, steps)[who]
        log_s = np.log(np.maximum(schedule.lr_sum(steps), 1e-12) / seen.lr_sum)
        rate = schedule.annealing[schedule.index(steps)]
        values, vectors = np.linalg.eigh(_error_covariance(log_s, rate - seen.lr, seen))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        wander = np.exp(self.draws[who, NAMES.index("wander")])[:, None]
        noise = np.exp(self.draws[who, NAMES.index("noise")])[:, None] * seen.scale
        error = wander * (rng.standard_normal(path.shape) @ root.T)
        drawn = path + error + noise * rng.standard_normal(path.shape)
        return np.maximum(drawn, 0.0)  # a loss in nats is not negative, however wide the interval

    def paths(self, target: Run, steps: ArrayLike) -> Floats:
        """[PARTICLES, k] the law alone, for every posterior draw, in nats per token."""
        schedule, seen = target.schedule, self.seen
        log_s = np.log(np.maximum(schedule.lr_sum(steps), 1e-12) / seen.lr_sum)
        return _law(self.draws, log_s, _lag(schedule, steps, seen.horizon), seen.scale)


def usable(run: Run) -> tuple[Ints, Floats]:
    """Steps and losses that the law reads: after the warm-up, within SPAN of the last one in S."""
    keep = run.steps > run.schedule.warmup_end
    steps, loss = run.steps[keep], run.loss[keep]
    if not steps.size:
        return steps, loss
    total = run.schedule.lr_sum(steps)
    recent = total >= total[-1] / SPAN
    return steps[recent], loss[recent]


def _observe(run: Run) -> Seen:
    schedule = run.schedule
    steps, loss = usable(run)
    if steps.size < MIN_POINTS:
        raise UserError(
            f"{run.name}: {steps.size} held-out losses after the warm-up "
            f"(step {schedule.warmup_end}) cannot carry a forecast; "
            f"wait for {MIN_POINTS}, or evaluate more often (eval.every)"
        )
    total = schedule.lr_sum(steps)
    log_s = np.log(total / total[-1])
    rate = schedule.annealing[steps - 1]
    lag = _lag(schedule, steps, _horizon(schedule))
    scale, slope = _local_line(log_s, loss)
    binned, count = _bin(np.column_stack([log_s, rate, loss, lag]), log_s)
    log_s, weight = binned[:, 0], np.sqrt(count)
    bare = Seen(
        cutoff=int(steps[-1]),
        lr_sum=float(total[-1]),
        lr=float(rate[-1]),
        scale=scale,
        slope=slope,
        horizon=_horizon(schedule),
        log_s=log_s,
        lag=binned[:, 3:],
        loss=binned[:, 2],
        weight=weight,
        basis=np.eye(len(weight)),
        variance=np.zeros(len(weight)),
    )
    # Right after the warm-up the loss still falls faster than any power law.
    settling = slope * (SETTLING * schedule.warmup_progress / (np.exp(log_s) * total[-1])) ** 2
    covariance = _error_covariance(log_s, binned[:, 1] - bare.lr, bare) + np.diag(settling**2)
    covariance *= np.outer(weight, weight)
    values, vectors = np.linalg.eigh(covariance)
    return replace(bare, basis=vectors, variance=np.maximum(values, 0.0))


def _local_line(log_s: Floats, loss: Floats) -> tuple[float, float]:
    """Loss at the cut-off, and its absolute slope in log S, by a line through the last points."""
    near = max(MIN_POINTS, int(np.sum(log_s > -0.7)))
    x, y = log_s[-near:], loss[-near:]
    slope, level = np.polyfit(x, y, 1)
    scale = max(abs(float(np.median(y[-3:]))), 1e-6)
    level = float(np.clip(level, 0.5 * scale, 2 * scale))
    # The floor keeps a flat or a noisy end from promising that nothing will ever change.
    return level, max(abs(float(slope)), 0.01 * scale)


def _bin(rows: Floats, log_s: Floats) -> tuple[Floats, Floats]:
    """Averages rows in at most MAX_POINTS equal bins of log S; returns them and their counts."""
    if len(rows) <= MAX_POINTS:
        return rows, np.ones(len(rows))
    edges = np.linspace(log_s[0], log_s[-1], MAX_POINTS + 1)[1:-1]
    _, which = np.unique(np.searchsorted(edges, log_s), return_inverse=True)
    count = np.bincount(which).astype(np.float64)
    sums = np.zeros((len(count), rows.shape[1]))
    np.add.at(sums, which, rows)
    return sums / count[:, None], count


def _lag(schedule: Schedule, steps: ArrayLike, horizon: int) -> Floats:
    """[k, len(TAUS)] the annealed rate at `steps` behind lags of TAUS * horizon steps, each of the
    largest batch."""
    at = schedule.time[schedule.index(steps)]
    whole = np.arange(_horizon(schedule)) + 0.5  # the middles of steps of the largest batch
    rate = schedule.annealing[np.searchsorted(schedule.time, whole).clip(max=schedule.steps - 1)]
    block = -(-rate.size // GRID)
    rate = np.concatenate([rate, np.full(-rate.size % block, rate[-1])]).reshape(-1, block).mean(1)
    ends = np.arange(rate.size + 1) * block
    lagged = np.empty((at.size, TAUS.size))
    for column, tau in enumerate(TAUS * horizon / block):
        keep = np.exp(-1.0 / tau)
        out, _ = lfilter([1.0 - keep], [1.0, -keep], rate, zi=[keep * rate[0]])
        lagged[:, column] = np.interp(at, ends, np.concatenate([rate[:1], out]))
    return lagged


def _horizon(schedule: Schedule) -> int:
    return int(np.ceil(schedule.time[-1]))


def _law(draws: Floats, log_s: Floats, lag: Floats, scale: float) -> Floats:
    """[p, k] the law for parameter draws [p, 7] at k points."""
    level, share, alpha, drop, tau = draws[:, :5].T
    part = expit(share)[:, None]
    stable = 1.0 - part + part * np.exp(np.clip(-np.exp(alpha)[:, None] * log_s, -50.0, 50.0))
    place = (tau - np.log(TAUS[0])) / np.log(TAUS[1] / TAUS[0])
    place = np.clip(place, 0.0, TAUS.size - 1.001)
    low = place.astype(np.int64)
    above = (place - low)[:, None]
    lagged = (1.0 - above) * lag.T[low] + above * lag.T[low + 1]
    return scale * np.exp(level)[:, None] * stable * (1.0 - np.exp(drop)[:, None] * (1.0 - lagged))


def _error_covariance(log_s: Floats, rate: Floats, seen: Seen) -> Floats:
    """[k, k] covariance in nats^2, at wander 1, of the law's error; zero at the cut-off."""
    drop = ANNEAL_WANDER / np.exp(PRIOR["wander"].mean) * np.exp(PRIOR["drop"].mean) * seen.scale
    return seen.slope**2 * _integrated(log_s) + drop**2 * _brownian(rate)


def _brownian(x: Floats) -> Floats:
    same = np.sign(x)[:, None] * np.sign(x) > 0
    return np.where(same, np.minimum(abs(x)[:, None], abs(x)), 0.0)


def _integrated(x: Floats) -> Floats:
    """Covariance of two-sided integrated Brownian motion: a^2 (3b - a) / 6 for a < b, one side."""
    near, far = np.minimum(abs(x)[:, None], abs(x)), np.maximum(abs(x)[:, None], abs(x))
    same = np.sign(x)[:, None] * np.sign(x) > 0
    return np.where(same, near**2 * (3 * far - near) / 6, 0.0)


def _log_likelihood(draws: Floats, seen: Seen) -> Floats:
    """[p] Gaussian log likelihood; one rotation serves every noise and wander."""
    residual = (seen.loss - _law(draws, seen.log_s, seen.lag, seen.scale)) * seen.weight
    rotated = residual @ seen.basis
    noise = (seen.scale * np.exp(draws[:, 5:6])) ** 2
    variance = noise + np.exp(2 * draws[:, 6:7]) * seen.variance
    return -0.5 * np.sum(rotated**2 / variance + np.log(variance), axis=1)
