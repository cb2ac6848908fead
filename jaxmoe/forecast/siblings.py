"""The rest of a run from completed cheaper runs of its recipe.

At the target's last eval, a share f of its schedule, each sibling i says how far it still fell,

    y_i = log(log(L_i(f) / L_i(end))),

and the siblings are donors at exactly that share: their curves are read at the target's own evals,
up to the cut-off and at the end, nowhere else. The law is a Bayesian regression of y on log of
active parameters and log L(f), centred at the target:

    y_i = y + beta log(N_i / N) + gamma log(L_i(f) / L(f)) + error

Curves that collapse (Qiu et al. 2025, arXiv:2507.02119: one shape once normalised by the reducible
loss) have beta = gamma = 0 but for the floor; the logarithm is taken because the remaining fall is
a share of what can still be reduced. The loss at the cut-off is that of a line through the evals
since SPAN of it, where there are enough; the scatter about the line is its noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Run
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.mixture import Mixture

__all__ = ["CONFORMAL", "Constants", "SiblingFit", "SiblingLaw", "usable_siblings"]

SPAN = 0.8
LINE_POINTS = 4
CONFORMAL = 20  # siblings from which on their own leave-one-out errors set the width
SAME_SIZE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Priors of the regression. `beta` alone is informed: the larger run falls further."""

    level: float = -1.5  # of y: the remaining fall is a fifth, within a factor of 20
    level_sd: float = 3.0
    beta: float = 0.10
    beta_sd: float = 0.15
    gamma_sd: float = 0.7
    noise: float = 0.02  # of y between runs: sets differ from 0.01 to 0.3
    noise_sd: float = 1.5  # of its log
    drift: float = 0.03  # of y, per e-fold of active parameters between sibling and target
    # The last three are tuned by cross-validation across sets (`score --benchmark`).
    width: float = 0.25  # of the regression's interval where its prior speaks alone
    known: float = 8.0  # siblings that speak as loud as the prior: beyond them the width nears 1
    seed: float = 0.002  # the error of the loss itself: seeds, the eval at the end

    def width_of(self, siblings: int) -> float:
        """Factor of the interval: the prior is too wide for runs of one recipe, what the siblings
        show is not, so the more of them speak, the nearer to 1."""
        return (self.width * self.known + siblings) / (self.known + siblings)


DEFAULT = Constants()


@dataclass(frozen=True, kw_only=True)
class SiblingLaw:
    """Fitted to a target's observations and its siblings together."""

    constants: Constants = DEFAULT
    name: str = "siblings"

    def fit(self, target: Run, siblings: Sequence[Run]) -> "SiblingFit":
        """The law for one target; a sibling that is incomplete or rose from there is left out.

        Raises:
            UserError: no observation of the target, no params_active, or no usable sibling.
        """
        if target.params_active is None:
            raise UserError(f"{target.name}: params_active is missing; siblings are told by size")
        if not target.steps.size:
            raise UserError(f"{target.name}: no held-out loss yet; wait for the first eval")
        shares = target.steps / target.schedule.steps
        level, noise = _level(shares, np.log(target.loss))
        donors = []
        for run in usable_siblings(target, siblings):
            donor = _donor(run, shares)
            if donor is not None:
                donors.append(donor)
        if not donors:
            raise UserError(
                f"{target.name}: none of {len(siblings)} siblings is complete, cheaper and falls "
                "from this share of its schedule; forecast the run alone"
            )
        rows = np.array(donors)
        return SiblingFit(
            law=self,
            end=target.schedule.steps,
            level=level,
            noise=noise,
            size=float(np.log(target.params_active)),
            sizes=rows[:, 0],
            levels=rows[:, 1],
            fall=rows[:, 2],
            noises=rows[:, 3],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SiblingFit:
    """What the regression reads of the target and of its n siblings (all [n])."""

    law: SiblingLaw
    end: int  # step that is forecast
    level: float  # log loss of the target at the cut-off
    noise: float  # its standard deviation
    size: float  # log active parameters
    sizes: Floats
    levels: Floats
    fall: Floats  # y
    noises: Floats  # of y, from the noise of the curves

    def mixture(self) -> Mixture:
        """Of the loss at the end, [1] target, nats per token."""
        k = self.law.constants
        weight, mean, sd = self._remaining()
        loss = np.exp(self.level - np.exp(mean))
        spread = loss * np.exp(mean) * sd
        drawn = Mixture(weight=weight, mean=loss[:, None], sd=spread[:, None])
        width = k.width_of(self.sizes.size) * self.conformal_factor()
        centre = drawn.predict()
        seed = np.hypot(k.seed, self.noise) * centre
        return drawn.calibrated(width=width, extra=seed, centre=centre)

    def predict(self) -> Floats:
        """[1] median loss at the end."""
        return self.mixture().predict()

    def sample(self, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, 1] draws of what would be measured at the end."""
        return self.mixture().sample(n, rng)

    def conformal_factor(self) -> float:
        """With CONFORMAL siblings, the 90 % quantile of their leave-one-out scores over 1.645.

        Split-conformal prediction (Vovk et al. 2005) on |z|: exchangeable runs are covered whatever
        the law's own width is. With fewer siblings the quantile is not theirs to give: 1.
        """
        n = self.sizes.size
        if n < CONFORMAL:
            return 1.0
        k = self.law.constants
        scores = []
        for i in range(n):
            keep = np.arange(n) != i
            one = SiblingFit(
                law=self.law,
                end=self.end,
                level=self.levels[i],
                noise=0.0,
                size=self.sizes[i],
                sizes=self.sizes[keep],
                levels=self.levels[keep],
                fall=self.fall[keep],
                noises=self.noises[keep],
            )
            weight, mean, sd = one._remaining()
            centre = weight @ mean
            variance = weight @ (sd**2 + mean**2) - centre**2
            width = k.width_of(n - 1)
            spread = np.hypot(width * np.sqrt(variance), k.seed / np.exp(centre))
            scores.append(abs(self.fall[i] - centre) / spread)
        rank = min(n, int(np.ceil(0.9 * (n + 1)))) - 1
        return float(np.clip(np.sort(scores)[rank] / 1.645, 0.5, 4.0))

    def _remaining(self) -> tuple[Floats, Floats, Floats]:
        """Weight, mean and sd [m] of y of the target over the nodes of noise and drift."""
        k = self.law.constants
        d = np.stack([self.sizes - self.size, self.levels - self.level], 1)
        ones = k.level_sd**2
        shared = ones + (d * np.array([k.beta_sd, k.gamma_sd]) ** 2) @ d.T
        residual = self.fall - k.beta * d[:, 0] - k.level
        noise, drift = np.meshgrid(
            np.exp(nodes(np.log(k.noise), k.noise_sd, 6)), k.drift * np.array([0.3, 1.0, 3.0])
        )
        noise, drift = noise.ravel(), drift.ravel()
        own = noise[:, None] ** 2 + self.noises**2 + (drift[:, None] * d[:, 0]) ** 2
        inverse = np.linalg.inv(shared + own[:, :, None] * np.eye(self.fall.size))
        pull = ones * inverse.sum(1)
        mean = k.level + pull @ residual
        variance = np.maximum(ones - ones * pull.sum(1), 1e-12) + noise**2
        score = -0.5 * np.einsum("i,mij,j->m", residual, inverse, residual)
        score += 0.5 * np.linalg.slogdet(inverse)[1]
        return np.exp(score - logsumexp(score)), mean, np.sqrt(variance)


def usable_siblings(target: Run, siblings: Sequence[Run]) -> list[Run]:
    """Those that are complete and smaller in active parameters."""
    found = []
    for run in siblings:
        if run.params_active is None or target.params_active is None or not run.steps.size:
            continue
        if run.steps[-1] != run.schedule.steps:
            continue
        if run.params_active < target.params_active * (1 - SAME_SIZE):
            found.append(run)
    return found


def _donor(run: Run, shares: Floats) -> tuple[float, float, float, float] | None:
    """log N, log loss at the cut-off, y and its noise of a sibling, read at the target's shares."""
    own = run.steps / run.schedule.steps
    at = shares[shares >= own[0] * (1 - 1e-9)]
    if not at.size or run.params_active is None:
        return None
    level, noise = _level(at, np.interp(at, own, np.log(run.loss)))
    fall = level - float(np.log(run.loss[-1]))
    if fall <= 0:
        return None
    return float(np.log(run.params_active)), level, float(np.log(fall)), noise / fall


def _level(shares: Floats, log_loss: Floats) -> tuple[float, float]:
    """Log loss at the last share by a line in log share since SPAN of it, and the scatter."""
    near = shares >= SPAN * shares[-1]
    if near.sum() < LINE_POINTS:
        return float(log_loss[-1]), 0.0
    x, y = np.log(shares[near] / shares[-1]), log_loss[near]
    slope, level = np.polyfit(x, y, 1)
    scatter = np.sqrt(np.sum((y - level - slope * x) ** 2) / (near.sum() - 2))
    return float(level), float(scatter)
