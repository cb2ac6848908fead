"""Laws of finished runs over compute, parameters and tokens, one interface.

Each is L = E + reducible terms + transient, over the effective tokens of `Points`:

    chinchilla   E + A N^-a + B D^-b                    Hoffmann et al. 2022, eq. 2
    outer power  E + K (r N^-a/g + (1 - r) D^-b/g)^g    a sum inside a power g below 1
    compute      E + A C^-b                             a frontier: needs no N or D

The transient, X (C / C_max)^-0.8, is ours: small runs of a ladder are often under-tuned (warm-up
too long, batch too large), their excess dies out fast with compute, and a law without it reads
their steep start as a high exponent. The error of a law is integrated Brownian motion in log C,
zero at the largest run: its slope drifts (the same as in `laws.py`), so small runs weigh less and
the interval widens as the power 3/2 of the log of the extrapolation ratio.

The priors are centred on published constants, picked by hand within them, and wide;
docs/forecast.md says how much the figures depend on each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.gaussian import Design, Noise, Posterior, nodes, solve
from jaxmoe.forecast.mixture import Mixture
from jaxmoe.forecast.points import Points, refuse_thin

__all__ = ["DEFAULT", "LAWS", "Constants", "DenseFit", "DenseLaw"]

REFERENCE_N, REFERENCE_D = 1e9, 2e10  # where the terms' sizes are known best
TOKEN_BYTES = 4.4  # of the tokens that the constants are of
BYTE_LIKE = 2.0  # bytes a token below which they say nothing but the floor
MAX_POINTS = 64  # of more, the largest and a geometric selection of the rest


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Priors and noise of the laws. Sizes of terms in nats per token, noises over the loss.

    The first block is published: Hoffmann et al. 2022 and its replication by Besiroglu et al. 2024
    (arXiv:2404.10102) give E 1.69 and 1.82, A-terms 0.35 and 0.36 and B-terms 0.53 and 0.35 at the
    reference sizes, exponents 0.28 to 0.37. The widths are ours, for other text and tokenizers.
    The second block is noise, which any backtest can check.
    """

    irreducible: float = 1.85
    irreducible_sd: float = 0.10  # relative
    params_term: float = 0.42
    tokens_term: float = 0.42
    term_sd: float = 0.25  # relative
    common_sd: float = 0.05  # of all three together: nats per token depend on the tokenizer
    exponent: float = 0.34
    exponent_sd: float = 0.40  # of its log
    reference_params: float = REFERENCE_N
    reference_tokens: float = REFERENCE_D
    transient: float = 0.02  # of the loss, at the largest run
    transient_sd: float = 0.02
    transient_power: float = 0.8

    noise: float = 0.003
    noise_sd: float = 0.8  # of its log
    noise_fall: float = 0.5  # noise of a run grows as C^-0.5 towards small ones
    noise_rise: float = 0.1  # and as C^0.1 beyond the largest
    wander: float = 0.0015  # per e-fold of compute to the power 3/2
    wander_sd: float = 1.0  # of its log

    # The third block alone is tuned, by cross-validation across sources (`score --benchmark`).
    width: float = 0.5  # of the stacked forecast about its median, from many budgets
    few: float = 2.0  # and from b of them times sqrt(1 + few / (b - 3)): L(C) has three constants
    misfit: float = 0.008  # over the loss, per unit spread of log(D / N) off one frontier

    def of(self, points: Points) -> "Constants":
        """Those for runs of this ladder: where its tokens are bytes or little more, the floor is
        that of as many bytes, and the rest starts from the ladder itself, equal terms in N and D at
        its largest run; models that small fall more slowly than published ones (exponents of 0.15
        to 0.25 in our own ladders on bytes). All of it is wide."""
        unit = float(np.nanmean(points.bytes_per_token)) if points.knows_bytes else TOKEN_BYTES
        if unit >= BYTE_LIKE:
            return self
        top = int(np.argmax(points.flops))
        loss = float(points.loss[top])
        floor = self.irreducible * unit / TOKEN_BYTES
        half = 0.5 * max(loss - floor, 0.3 * loss)
        return replace(
            self,
            irreducible=floor,
            irreducible_sd=0.5,
            params_term=half,
            tokens_term=half,
            term_sd=0.5,
            exponent=0.25,
            exponent_sd=0.5,
            reference_params=float(points.params_active[top]),
            reference_tokens=float(points.effective_tokens[top]),
        )


DEFAULT = Constants()
Features = Callable[["DenseLaw", Points, float], Floats]


@dataclass(frozen=True, kw_only=True)
class DenseLaw:
    """One law; `fit` gives a posterior that predicts any target."""

    name: str
    constants: Constants = DEFAULT

    def fit(self, points: Points) -> "DenseFit":
        """Raises UserError where the runs are too few or too alike."""
        refuse_thin(points)
        return self.fit_unchecked(points)

    def fit_unchecked(self, points: Points) -> "DenseFit":
        """`fit` without the refusal, for backtests on parts of a ladder."""
        own = replace(self, constants=self.constants.of(points))
        return DenseFit(law=own, points=thinned(points))

    def features(self, points: Points, scale: float) -> Floats:
        """[g, n, p] the reducible terms and E over `scale`, each at its prior size."""
        return FEATURES[self.name](self, points, scale)

    def coefficients(self) -> tuple[Floats, Floats]:
        """Prior mean [p] and covariance [p, p] of the features' coefficients and the transient."""
        k = self.constants
        terms = 2 if self.name == "chinchilla" else 1
        sd = np.array([k.irreducible_sd] + [k.term_sd] * terms)
        covariance = np.zeros((terms + 2, terms + 2))
        covariance[:-1, :-1] = np.diag(sd**2) + k.common_sd**2
        covariance[-1, -1] = k.transient_sd**2
        return np.array([1.0] * (terms + 1) + [k.transient]), covariance


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseFit:
    """A law and the runs it has seen."""

    law: DenseLaw
    points: Points

    def posterior(self, target: Points) -> Posterior:
        """The posterior, with its prediction of the target's runs."""
        k, seen = self.law.constants, self.points
        top = float(seen.flops.max())
        scale = float(np.median(seen.loss[np.argsort(seen.flops)[-3:]]))
        mean, covariance = self.law.coefficients()
        design = Design(
            seen=self._features(seen, scale, top),
            wanted=self._features(target, scale, top),
            mean=mean,
            covariance=covariance,
            scale=scale,
        )
        x, ahead = np.log(seen.flops / top), np.log(target.flops / top)
        wander = np.exp(nodes(np.log(k.wander), k.wander_sd, 3))
        level = np.exp(nodes(np.log(k.noise), k.noise_sd, 3))
        noise = Noise(
            wander=np.repeat(wander, 3),
            level=np.tile(level, 3),
            seen=integrated(x),
            wanted=np.abs(ahead) ** 3 / 3,
            spread=np.exp(-2 * k.noise_fall * x) * (seen.loss / scale) ** 2,
            spread_wanted=np.exp(2 * k.noise_rise * np.maximum(ahead, 0.0)),
        )
        return solve(seen.loss, design, noise)

    def mixture(self, target: Points) -> Mixture:
        """What would be measured at the target's runs."""
        return self.posterior(target).prediction

    def predict(self, target: Points) -> Floats:
        """[t] medians, nats per token."""
        return self.mixture(target).predict()

    def sample(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of what would be measured."""
        return self.mixture(target).sample(n, rng)

    def curves(self, target: Points, *, n: int, rng: np.random.Generator) -> Floats:
        """[n, t] draws of the law alone: exponents and coefficients, without its own error and the
        noise of runs. The targets of one draw are of one law."""
        seen = self.points
        posterior = self.posterior(target.take([0]))
        scale = float(np.median(seen.loss[np.argsort(seen.flops)[-3:]]))
        features = self._features(target, scale, float(seen.flops.max()))
        node = rng.choice(posterior.weight.size, size=n, p=posterior.weight)
        values, vectors = np.linalg.eigh(posterior.covariance[node])
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        drawn = posterior.coefficients[node]
        drawn = drawn + np.einsum("cpq,cq->cp", root, rng.standard_normal(drawn.shape))
        # Nodes are noises times exponents, these innermost.
        return scale * np.einsum("ctp,cp->ct", features[node % len(features)], drawn)

    def _features(self, points: Points, scale: float, top: float) -> Floats:
        law = self.law.features(points, scale)
        excess = (points.flops / top) ** -self.law.constants.transient_power
        return np.concatenate(
            [law, np.broadcast_to(excess[None, :, None], (*law.shape[:2], 1))], axis=2
        )


def integrated(x: Floats) -> Floats:
    """[n, n] covariance of integrated Brownian motion that is zero, and flat, at x = 0 (x <= 0)."""
    near = np.minimum(abs(x)[:, None], abs(x))
    far = np.maximum(abs(x)[:, None], abs(x))
    same = np.sign(x)[:, None] * np.sign(x) > 0
    return np.where(same, near**2 * (3 * far - near) / 6, 0.0)


def thinned(points: Points) -> Points:
    """At most MAX_POINTS runs, the largest first, denser towards the largest."""
    order = np.argsort(-points.flops, kind="stable")
    if order.size > MAX_POINTS:
        places = np.unique(np.geomspace(1, order.size, MAX_POINTS).round().astype(int) - 1)
        order = order[places]
    return points.take(order)


def _exponents(law: DenseLaw, count: int) -> Floats:
    k = law.constants
    return np.exp(nodes(np.log(k.exponent), k.exponent_sd, count))


def _chinchilla(law: DenseLaw, points: Points, scale: float) -> Floats:
    k = law.constants
    a, b = (g.ravel()[:, None] for g in np.meshgrid(_exponents(law, 5), _exponents(law, 5)))
    n = np.log(points.params_active / k.reference_params)
    d = np.log(points.effective_tokens / k.reference_tokens)
    size = k.params_term * np.exp(-a * n)
    data = k.tokens_term * np.exp(-b * d)
    return np.stack([np.full(size.shape, k.irreducible), size, data], 2) / scale


def _outer(law: DenseLaw, points: Points, scale: float) -> Floats:
    k = law.constants
    grid = np.meshgrid(
        _exponents(law, 3), _exponents(law, 3), nodes(0.5, 0.15, 3), np.array([0.45, 0.6, 0.8])
    )
    a, b, share, g = (x.ravel()[:, None] for x in grid)
    n = np.log(points.params_active / k.reference_params)
    d = np.log(points.effective_tokens / k.reference_tokens)
    inner = share * np.exp(-a / g * n) + (1 - share) * np.exp(-b / g * d)
    term = (k.params_term + k.tokens_term) * inner**g
    return np.stack([np.full(term.shape, k.irreducible), term], 2) / scale


def _compute(law: DenseLaw, points: Points, scale: float) -> Floats:
    k = law.constants
    # On the frontier N and D grow alike, so C^-b has half of the exponent of N^-a.
    b = 0.5 * _exponents(law, 9)[:, None]
    term = (k.params_term + k.tokens_term) * np.exp(
        -b * np.log(points.flops / (6 * k.reference_params * k.reference_tokens))
    )
    return np.stack([np.full(term.shape, k.irreducible), term], 2) / scale


FEATURES: dict[str, Features] = {
    "chinchilla": _chinchilla,
    "outer power": _outer,
    "compute": _compute,
}
LAWS = tuple(DenseLaw(name=name) for name in FEATURES)


def with_constants(constants: Constants) -> tuple[DenseLaw, ...]:
    """The laws with other constants."""
    return tuple(replace(law, constants=constants) for law in LAWS)
