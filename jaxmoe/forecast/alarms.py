"""Alarms while a run goes on: has its loss left the path that it was on?

The slow alarm. Against the log of the step, the log of the held-out loss is a level whose slope
drifts: an integrated random walk, seen through noise of a scale that is learnt on the way, with an
outlier now and then. An alternative says that from observation j on the loss is higher by d: the
same model of what is left without d. The evidence

    E_i = sum over j <= i and d of prior(j, d) p(y_j .. y_i | d from j on) / p(y_j .. y_i)

is a martingale where no shift is, so that P(E >= 1 / alpha at any time) <= alpha by Ville's
inequality (an e-process: Ramdas et al., arXiv:2210.01948; over unknown starts: Shin, Ramdas and
Rinaldo, arXiv:2203.03532). Each alternative keeps a state of its own: a fault is not absorbed by
the fit. Beside it a CUSUM of the standardised residuals (Page 1954) sees slow drifts.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special, stats

from jaxmoe.forecast.curve import Floats

__all__ = ["Alarm", "Band", "Prior", "ShiftWatch", "SpikeWatch", "beside", "look_at", "prior_of"]

# Shifts of the log of the loss. Exact ones: with a spread they would fit bends of the curve too.
# What is far from all of them is an outlier to each, until the CUSUM sees that it stays.
SIZES = (0.003, 0.006, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
DRIFTS = 10.0 ** np.arange(8)  # variance of the slope's drift over that of the noise
# How often an observation is an outlier, and by how much its noise is wider. One alone is evidence
# of 200,000 at most: a shift, where no more than 200 observations are expected.
OUTLIERS, WIDER = 1e-4, 20.0
FREEDOM = 30.0  # observations that the scale is learnt from, at most: it may change
FIRST = 4  # observations before the first shift can be told from a slope
KEPT = 24  # newest starts of shifts that are followed: older ones would have shown
# Of the CUSUM, of residuals of at most 4: curves bend, so by far more than noise would ask.
ALLOWANCE, LIMIT, LARGEST = 1.0, 10.0, 4.0

_LOOK = {
    "spike": "the batch: jaxmoe.data inspect RUN_DIR --step {step}; then the router's load",
    "shift": "what changed at step {step}: data, learning rate, a restart; then experts, devices",
    "drift": "the learning rate and the router's load since step {step}",
    "left the band": "the recipe: is it the ladder's? then data and learning rate",
    "too good": "leakage: python -m jaxmoe.data overlap; a miracle is less likely",
}


def look_at(kind: str, step: int) -> str:
    """What an on-call engineer looks at first."""
    return _LOOK[kind].format(step=step)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Attributes:
    kind: spike, shift, drift, left the band or too good.
    since: the step from which on, by the evidence.
    evidence: numbers, JSON-able.
    """

    kind: str
    step: int
    since: int
    evidence: dict[str, float]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        first = look_at(self.kind, self.since)
        return f"{self.kind} since step {self.since} ({shown}); look at {first}"


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What is known of the noise before the run's own curve.

    Attributes:
        scale: standard deviation of the log of the loss.
        freedom: observations that this is worth.
        drift: log10 of the likeliest of DRIFTS, and its spread; None: all alike.
    """

    scale: float = 1e-3
    freedom: float = 2.0
    drift: tuple[float, float] | None = None

    def log_weights(self) -> Floats:
        if self.drift is None:
            return np.full(len(DRIFTS), -math.log(len(DRIFTS)))
        center, spread = self.drift
        weights = -0.5 * ((np.log10(DRIFTS) - center) / spread) ** 2
        return weights - _log_sum(weights)


@dataclass
class _Bank:
    """Kalman filters [hypotheses, drifts]: hypothesis 0 is no shift."""

    mean: Floats  # [H, Q, 2]: level and slope
    cov: Floats  # [H, Q, 2, 2], in units of the noise's variance
    freedom: Floats  # [H, Q] and
    squares: Floats  # [H, Q]: of the noise's scale, inverse gamma
    weight: Floats  # [H, Q]: log of the drifts'
    total: Floats  # [H]: log likelihood so far
    shift: Floats  # [H]
    prior: Floats  # [H]: log
    start: Floats  # [H]: number of the observation

    @classmethod
    def fresh(cls, prior: Prior) -> "_Bank":
        one = np.ones((1, len(DRIFTS)))
        return cls(
            mean=np.zeros((*one.shape, 2)),
            cov=np.tile(np.diag([1e6, 1e8]), (*one.shape, 1, 1)),  # anything
            freedom=prior.freedom * one,
            squares=prior.freedom * prior.scale**2 * one,
            weight=prior.log_weights()[None],
            total=np.zeros(1),
            shift=np.zeros(1),
            prior=np.zeros(1),
            start=np.zeros(1),
        )

    def advance(self, dx: float) -> None:
        """The slope drifts for a time of `dx`."""
        move = np.array([[1.0, dx], [0.0, 1.0]])
        spread = np.array([[dx**3 / 3, dx**2 / 2], [dx**2 / 2, dx]])
        self.mean = self.mean @ move.T
        self.cov = move @ self.cov @ move.T + DRIFTS[:, None, None] * spread

    def branch(self, sizes: Floats, log_prior: float, number: int) -> None:
        """Alternatives that begin here; the oldest ones are dropped, which E can only lose by."""
        n = len(sizes)
        new = {
            name: np.repeat(getattr(self, name)[:1], n, axis=0)
            for name in ("mean", "cov", "freedom", "squares", "weight", "total")
        }
        new |= {"shift": sizes, "prior": np.full(n, log_prior), "start": np.full(n, float(number))}
        first = 1 + n if len(self.shift) > KEPT * n else 1
        for name, rows in new.items():
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old[:1], old[first:], rows]))

    def observe(self, y: float) -> float:
        """The standard normal of y's place in what hypothesis 0 predicted."""
        error = (y - self.shift)[:, None] - self.mean[..., 0]
        each = [self._log_t(error, noise) for noise in (1.0, WIDER**2)]
        inlier, outlier = each[0] + math.log1p(-OUTLIERS), each[1] + math.log(OUTLIERS)
        likelihood = np.logaddexp(inlier, outlier)
        z = self._place(error[0])
        new = _log_sum(self.weight + likelihood)
        self.total = self.total + new
        self.weight = np.maximum(self.weight + likelihood - new[:, None], -30)  # none dies for good
        self._update(error, np.exp(inlier - likelihood))
        return z

    def _log_t(self, error: Floats, noise: float) -> Floats:
        nu = self.freedom
        variance = self.squares / nu * (self.cov[..., 0, 0] + noise)
        constant = special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2)
        log_spread = 0.5 * np.log(np.pi * nu * variance)
        return constant - log_spread - (nu + 1) / 2 * np.log1p(error**2 / variance / nu)

    def _place(self, error: Floats) -> float:
        nu = self.freedom[0]
        scaled = error / np.sqrt(self.squares[0] / nu * (self.cov[0, :, 0, 0] + 1))
        weights = np.exp(self.weight[0])
        below = float(np.clip(weights @ stats.t.cdf(scaled, nu) / weights.sum(), 1e-12, 1 - 1e-12))
        return float(special.ndtri(below))

    def _update(self, error: Floats, share: Floats) -> None:
        """By an observation of which `share` is no outlier: its noise is so much wider."""
        variance = self.cov[..., 0, 0] + 1 / np.maximum(share, 1e-6)
        gain = self.cov[..., :, 0] / variance[..., None]
        self.mean = self.mean + gain * error[..., None]
        self.cov = self.cov - gain[..., :, None] * self.cov[..., None, 0, :]
        squares = self.squares + share * error**2 / variance
        freedom = self.freedom + share
        fade = np.minimum(1, FREEDOM / freedom)
        self.squares, self.freedom = squares * fade, freedom * fade


@dataclass(frozen=True, kw_only=True)
class Seen:
    """After an observation.

    Attributes:
        z: its standardised residual, one step ahead.
        log_e: the log of the evidence for a shift upwards.
        cusum: of the residuals.
        since: step of the likeliest start.
        size: likeliest shift of the log of the loss.
    """

    z: float
    log_e: float
    cusum: float
    since: int
    size: float


class ShiftWatch:
    """Held-out losses one after another; upward shifts and drifts of their path."""

    def __init__(
        self,
        expected: int,
        *,
        alpha: float = 0.01,
        prior: Prior | None = None,
        baseline: Callable[[float], float] | None = None,
    ) -> None:
        """Args:
        expected: observations of the whole run; shifts are as likely at each of them. More may
            come: those share half of the prior.
        alpha: chance of a false alarm of the slow kind in a run, at most.
        prior, baseline: of completed siblings (`prior_of`); baseline(step) is what they had, in the
            log of the loss.
        """
        self._expected, self._threshold = max(1, expected), -math.log(alpha)
        self._baseline = baseline
        self._bank = _Bank.fresh(prior or Prior())
        self._steps: list[int] = []
        self._cusum, self._cusum_since = 0.0, 0
        self._raised: set[str] = set()

    def add(self, step: int, loss: float) -> tuple[Seen, list[Alarm]]:
        """`step` above the one before, from 1 on. An alarm of each kind is raised once."""
        assert not self._steps or step > self._steps[-1], (step, self._steps[-1])
        y = math.log(loss) - (self._baseline(step) if self._baseline else 0.0)
        if self._steps:
            self._bank.advance(math.log(step / self._steps[-1]))
        number = len(self._steps)
        self._steps.append(step)
        if number >= FIRST:
            self._bank.branch(np.array(SIZES), self._log_prior(number), number)
        z = self._bank.observe(y)
        seen = self._look(z if number >= FIRST else 0.0, step)
        return seen, [*self._alarms(step, seen)]

    def _log_prior(self, number: int) -> float:
        share = 0.5 / self._expected * min(1.0, (self._expected / (number + 1)) ** 2)
        return math.log(share / len(SIZES))

    def _look(self, z: float, step: int) -> Seen:
        if self._cusum == 0:
            self._cusum_since = step
        self._cusum = max(0.0, self._cusum + min(z, LARGEST) - ALLOWANCE)
        bank = self._bank
        evidence = bank.prior[1:] + bank.total[1:] - bank.total[0]
        if not len(evidence):
            return Seen(z=z, log_e=-math.inf, cusum=self._cusum, since=step, size=0.0)
        best = int(evidence.argmax())
        return Seen(
            z=z,
            log_e=float(_log_sum(evidence)),
            cusum=self._cusum,
            since=self._steps[int(bank.start[1 + best])],
            size=float(bank.shift[1 + best]),
        )

    def _alarms(self, step: int, seen: Seen) -> Sequence[Alarm]:
        found = []
        if seen.log_e >= self._threshold and "shift" not in self._raised:
            evidence = {"log e": seen.log_e, "of": self._threshold, "higher by": seen.size}
            found.append(Alarm(kind="shift", step=step, since=seen.since, evidence=evidence))
        if seen.cusum >= LIMIT and "drift" not in self._raised:
            evidence = {"CUSUM": seen.cusum, "of": LIMIT}
            found.append(Alarm(kind="drift", step=step, since=self._cusum_since, evidence=evidence))
        self._raised |= {alarm.kind for alarm in found}
        return found


@dataclass
class SpikeWatch:
    """One value a step (training loss, gradient norm): far above the median of those before, in
    robust standard deviations of their logs (1.4826 median absolute deviations), at least
    `floor`."""

    name: str
    window: int = 64
    least: int = 16
    limit: float = 8.0
    floor: float = 0.01
    values: deque[float] = field(default_factory=deque)

    def add(self, step: int, value: float) -> Alarm | None:
        log = math.log(value) if value > 0 and math.isfinite(value) else math.inf
        alarm = None
        if len(self.values) >= self.least:
            before = np.array(self.values)
            middle = float(np.median(before))
            spread = max(self.floor, 1.4826 * float(np.median(np.abs(before - middle))))
            z = (log - middle) / spread
            if z > self.limit:
                evidence = {self.name: value, "usual": math.exp(middle), "z": min(z, 1e6)}
                alarm = Alarm(kind="spike", step=step, since=step, evidence=evidence)
        if math.isfinite(log):
            self.values.append(log)
            while len(self.values) > self.window:
                self.values.popleft()
        return alarm


@dataclass
class Band:
    """A registered path, which is frozen: steps and the 5, 50 and 95 % quantiles of the loss.

    Two losses in a row beyond `limit` of its standard deviations on one side are an alarm. By the
    normal distribution one is, on a side, 1 in 2,000; and a forecast errs on one side for long.
    """

    path: Sequence[Any]  # of hook_api.PathPoint
    limit: float = 3.29
    _outside: int = 0
    _since: int = 0
    _raised: set[str] = field(default_factory=set)

    def at(self, step: int) -> tuple[float, float, float] | None:
        """The 5, 50 and 95 % quantiles at a step; None before the path begins."""
        steps = [point.step for point in self.path]
        if not steps or step < steps[0]:
            return None
        low, middle, high = (
            float(np.interp(step, steps, [getattr(point, name) for point in self.path]))
            for name in ("q05", "median", "q95")
        )
        return low, middle, high

    def add(self, step: int, loss: float) -> tuple[float, Alarm | None]:
        """The residual in standard deviations (0 before the path begins), and an alarm."""
        if (expected := self.at(step)) is None:
            return 0.0, None
        low, middle, high = expected
        z = (loss - middle) / max((high - low) / 3.29, 1e-9)
        side = 0 if abs(z) <= self.limit else (1 if z > 0 else -1)
        if side == 0 or side * self._outside < 0:
            self._outside = 0
        if side:
            self._since = step if self._outside == 0 else self._since
            self._outside += side
        kind = "left the band" if side > 0 else "too good"
        if abs(self._outside) < 2 or kind in self._raised:
            return z, None
        self._raised.add(kind)
        evidence = {"loss": loss, "registered": middle, "sigmas": z}
        return z, Alarm(kind=kind, step=step, since=self._since, evidence=evidence)


def _log_sum(logs: Floats) -> Floats:
    """Over the last dim."""
    return np.asarray(special.logsumexp(logs, axis=-1))


# What completed siblings tell


def beside(
    siblings: Sequence[tuple[Floats, Floats]],
) -> Callable[[float], float]:
    """The siblings' median log loss at a share of the run.

    Args:
        siblings: of each, shares of its run (rising) and losses there; completed runs only, since
            their whole curves are used.
    """
    curves = [(np.log(share), np.log(loss)) for share, loss in siblings]
    return lambda share: float(np.median([np.interp(math.log(share), x, y) for x, y in curves]))


def prior_of(siblings: Sequence[tuple[Floats, Floats]], freedom: float = 8.0) -> Prior:
    """The noise and drift of each sibling around the others, by the likelihood on a grid.

    Args:
        siblings: three or more, as for `beside`.
    """
    scales, drifts = 10.0 ** np.arange(-4.25, -1.9, 0.25), 10.0 ** np.arange(-7, 1, 0.5)
    scale, drift = (a.ravel() for a in np.meshgrid(scales, drifts, indexing="ij"))
    total = np.zeros(len(scale))
    for i, (share, loss) in enumerate(siblings):
        others = beside([s for k, s in enumerate(siblings) if k != i])
        left = np.log(loss) - [others(s) for s in share]
        total += _likelihood(np.log(share), left, scale, drift)
    best = int(total.argmax())
    ratio = float(np.log10(drift[best] / scale[best] ** 2))
    return Prior(scale=float(scale[best]), freedom=freedom, drift=(ratio, 1.0))


def _likelihood(x: Floats, y: Floats, scale: Floats, drift: Floats) -> Floats:
    """Log, of the observations from the fourth on; one of 5 sigmas counts no more than that."""
    mean = np.stack([np.full_like(scale, y[0]), np.zeros_like(scale)], axis=-1)
    cov = np.zeros((len(scale), 2, 2))
    cov[:, 0, 0], cov[:, 1, 1] = scale**2, 1.0
    total = np.zeros_like(scale)
    for i in range(1, len(x)):
        dx = x[i] - x[i - 1]
        move = np.array([[1.0, dx], [0.0, 1.0]])
        spread = np.array([[dx**3 / 3, dx**2 / 2], [dx**2 / 2, dx]])
        mean = mean @ move.T
        cov = move @ cov @ move.T + drift[:, None, None] * spread
        error, variance = y[i] - mean[:, 0], cov[:, 0, 0] + scale**2
        if i >= 3:
            total -= 0.5 * np.log(variance) + np.minimum(0.5 * error**2 / variance, 12.5)
        gain = cov[:, :, 0] / variance[:, None]
        mean = mean + gain * error[:, None]
        cov = cov - gain[:, :, None] * cov[:, None, 0, :]
    return total
