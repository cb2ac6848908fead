"""Laws of mixtures of experts over active parameters, experts (or sparsity) and tokens.

    log(L - c) = k - alpha x - (delta_router + eta x - zeta e) e - kappa log(top_k) - beta d

with x = log(N / N_max seen), e = log of the expansion and d = log(D / D_max seen). At one expert
and top-1 the expansion is 1, e = 0, and what is left is the dense power law. Two expansions:

    saturating  the share of all parameters to active ones, N_total / N_active, capped at SATURATION
                as 1 / e^ = 1 / r + 1 / cap (Clark et al. 2022, arXiv:2202.01169, eq. 8: its E^)
    joint       the number of experts E, as Ludziejewski et al. 2025 (arXiv:2502.05172, eq. 3) do

`eta` is the interaction of Clark et al. (eq. 6): experts help large models less. The floor c is
marginalised over a grid, the rest is linear and Gaussian; the errors are relative and independent.
"""

from dataclasses import dataclass

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.dense_laws import DEFAULT
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.mixture import Mixture, combine
from jaxmoe.forecast.points import Points

__all__ = ["MoeFit", "MoeLaw", "MoeStack", "MoeStackFit"]

SATURATION = 1024.0
FLOOR_SD = 0.07  # of c over the least loss seen
ALPHA = (0.30, 0.10)
DELTA = (0.10, 0.10)
ETA_SD = 0.005  # Clark et al. found 0.01 in log L, much of it the floor that is explicit here
ZETA_SD = 0.01
KAPPA_SD = 0.10
BETA = (0.30, 0.10)
TOGETHER = 0.14  # that both fall short of these where D grows with N: they sum to dense_laws' 0.34
ROUTER_SD = 0.03  # of delta between routers
NOISES = np.array([0.003, 0.006, 0.012])  # relative, of a run about the law
DRIFT = 0.004  # relative error of the law per e-fold of active parameters beyond the largest seen
MIN_RUNS = 8
PRIOR_SHARE = (0.8, 0.2)
MIN_SPAN = 0.2  # decades of active parameters


@dataclass(frozen=True, kw_only=True)
class MoeLaw:
    """`expansion`: "saturating" or "joint"."""

    expansion: str = "saturating"

    @property
    def name(self) -> str:
        return f"moe {self.expansion}"

    def fit(self, points: Points) -> "MoeFit":
        """Raises UserError on fewer than MIN_RUNS runs or under MIN_SPAN decades of sizes."""
        if self.expansion not in ("saturating", "joint"):
            raise UserError(f"expansion={self.expansion!r}: use 'saturating' or 'joint'")
        sizes = points.params_active
        span = float(np.log10(sizes.max() / sizes.min())) if len(points) else 0.0
        if len(points) < MIN_RUNS or span < MIN_SPAN:
            raise UserError(
                f"{len(points)} runs over {span:.2f} decades of active parameters cannot carry a "
                f"law of experts; give {MIN_RUNS} runs over {MIN_SPAN} decades"
            )
        return MoeFit(law=self, points=points, routers=_routers(points))


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeFit:
    """A law and the runs it has seen. A router not among them gets the mean of those that are."""

    law: MoeLaw
    points: Points
    routers: tuple[str, ...]

    def mixture(self, target: Points) -> Mixture:
        """What would be measured at the target's runs."""
        seen = self.points
        x, ahead = self._columns(seen), self._columns(target)
        mean, sd = self._prior()
        least = float(seen.loss.min())
        shares = np.clip(nodes(self._floor(), FLOOR_SD, 13), 0.05, 0.97)
        weights, means, sds = [], [], []
        far = np.maximum(np.log(target.params_active / seen.params_active.max()), 0.0)
        for share in shares:
            floor = share * least
            y = np.log(seen.loss - floor)
            for level in NOISES:
                noise = level * seen.loss / (seen.loss - floor)  # relative noise, on the log scale
                white = x / noise[:, None]
                precision = white.T @ white + np.diag(1 / sd**2)
                pull = white.T @ (y / noise) + mean / sd**2
                b = np.linalg.solve(precision, pull)
                square = np.sum((y / noise) ** 2) + np.sum((mean / sd) ** 2) - b @ pull
                log_det = np.linalg.slogdet(precision)[1]
                weights.append(-0.5 * (square + log_det) - np.sum(np.log(noise) + y))
                term = np.exp(ahead @ b)
                spread = np.einsum("tp,pt->t", ahead, np.linalg.solve(precision, ahead.T))
                total = floor + term
                error = (level**2 + (DRIFT * far) ** 2) * total**2
                means.append(total)
                sds.append(np.sqrt(spread * term**2 + error))
        log = np.array(weights)
        weight = np.exp(log - log.max())
        return Mixture(weight=weight / weight.sum(), mean=np.array(means), sd=np.array(sds)).prune()

    def predict(self, target: Points) -> Floats:
        """[t] medians, nats per token."""
        return self.mixture(target).predict()

    def sample(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of what would be measured."""
        return self.mixture(target).sample(n, rng)

    def _columns(self, p: Points) -> Floats:
        x = np.log(p.params_active / self.points.params_active.max())
        d = np.log(p.effective_tokens / self.points.effective_tokens.max())
        if self.law.expansion == "joint":
            e = np.log(np.maximum(p.experts, 1.0))
        else:
            ratio = np.maximum(p.params_total / p.params_active, 1.0)
            e = np.log((1 + 1 / SATURATION) / (1 / ratio + 1 / SATURATION))
        columns = [np.ones(len(p)), -x, -e, -e * x, e * e, -np.log(p.top_k), -d]
        columns += [-e * (p.router == name) for name in self.routers]
        return np.stack(columns, 1)

    def _prior(self) -> tuple[Floats, Floats]:
        each = [ROUTER_SD] * len(self.routers)
        less = TOGETHER * self._together()
        mean = [0.0, ALPHA[0] - less, DELTA[0], 0.0, 0.0, 0.0, BETA[0] - less]
        mean += [0.0] * len(each)
        sd = [3.0, ALPHA[1], DELTA[1], ETA_SD, ZETA_SD, KAPPA_SD, BETA[1], *each]
        return np.array(mean), np.array(sd)

    def _together(self) -> float:
        """How log D grows with log N over the runs: 0 at one D, 1 where D is proportional to N."""
        x, d = np.log(self.points.params_active), np.log(self.points.effective_tokens)
        return float(np.clip(np.cov(x, d)[0, 1] / np.var(x, ddof=1), 0.0, 1.0))

    def _floor(self) -> float:
        """Expected share of c in the least loss: with the constants of `dense_laws`, at the size of
        that run. The term in tokens belongs to c where all runs have the same tokens."""
        best = int(np.argmin(self.points.loss))
        k = DEFAULT.of(self.points)
        n = float(self.points.params_active[best]) / k.reference_params
        d = float(self.points.effective_tokens[best]) / k.reference_tokens
        by_size = k.params_term * n**-k.exponent
        by_tokens = k.tokens_term * d**-k.exponent
        floor = k.irreducible + (1 - self._together()) * by_tokens
        return floor / (k.irreducible + by_size + by_tokens)


@dataclass(frozen=True, kw_only=True)
class MoeStack:
    """Both expansions, weighed by a backtest: the largest size from those of at most half of it."""

    def fit(self, points: Points) -> "MoeStackFit":
        laws = (MoeLaw(expansion="saturating"), MoeLaw(expansion="joint"))
        fits = tuple(law.fit(points) for law in laws)
        share = np.log(PRIOR_SHARE)
        score = np.zeros(len(laws))
        largest = points.params_active >= points.params_active.max() * 0.999
        smaller = points.params_active <= points.params_active.max() / 2
        if smaller.any():
            rest = points.take(largest)
            try:
                parts = [law.fit(points.take(smaller)) for law in laws]
            except UserError:  # too few sizes to hold one out
                parts = []
            if parts:
                # Runs of one size err alike: they count as one.
                score = np.array([np.mean(p.mixture(rest).log_score(rest.loss)) for p in parts])
        weight = np.exp(share + score - score.max())
        return MoeStackFit(fits=fits, weight=weight / weight.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeStackFit:
    """Both laws and their weights [2]."""

    fits: tuple[MoeFit, ...]
    weight: Floats

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each law by name."""
        names = [fit.law.name for fit in self.fits]
        return {name: float(w) for name, w in zip(names, self.weight, strict=True)}

    def mixture(self, target: Points) -> Mixture:
        """What would be measured at the target's runs."""
        return combine([fit.mixture(target) for fit in self.fits], self.weight)

    def predict(self, target: Points) -> Floats:
        """[t] medians, nats per token."""
        return self.mixture(target).predict()

    def sample(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of what would be measured."""
        return self.mixture(target).sample(n, rng)


def _routers(points: Points) -> tuple[str, ...]:
    mixed = np.maximum(points.params_total / points.params_active, points.experts) > 1.0
    return tuple(sorted(set(points.router[mixed].tolist()) - {""}))
