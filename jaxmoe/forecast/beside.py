"""A ladder beside an earlier one whose larger runs are known: from loss to loss.

    log L(target) = log L_earlier(runs of the target's sizes) + log ratio(target)

L_earlier is by the laws of the earlier ladder (`stack`). The ratio is measured where both ladders
have runs of equal sizes, and a line over log compute (`trend`) from there on. Losses of one family
on other text, or of a changed recipe, are shifted power laws of each other (Brandfonbrener et al.
2024, arXiv:2411.12925), so the log of their ratio bends slowly: what bends in both ladders (small
models that have not yet learnt to look back, say) is told by the large runs of the earlier one.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.mixture import Mixture
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.stack import Stack, StackFit
from jaxmoe.forecast.trend import Prior, Trend

__all__ = ["Beside", "BesideFit"]

# Of the log ratio of losses: at the largest rung, per e-fold of compute, and how that drifts: a
# ratio that changes fast may also change how fast. log L falls by 0.03 to 0.1 per e-fold; two
# recipes on one text differ in that by a hundredth of it to a tenth, two texts by up to a third.
# A trend over small runs may die away as losses near their floors: in our one case at 300 times the
# compute a slope of 0.023 between two texts was gone beyond the rungs (LOG.md, 2026-11-23).
PRIOR = Prior(
    level=0.5,
    trend=((0.001, 1e-4), (0.003, 3e-4), (0.01, 1e-3), (0.03, 3e-3)),
    lengths=(0.5, 1.0, 2.0, 4.0, np.inf),
)
ALIKE = 0.1  # in logs of parameters, of tokens and of compute: up to here sizes are equal
MIN_RUNGS = 3
SHARE = 1e-3  # of the largest weight: lighter pairs of components are dropped


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """The law of runs beside those of an earlier ladder."""

    earlier: Points

    name = "beside an earlier ladder"

    def fit(self, points: Points) -> "BesideFit":
        """Raises UserError where the earlier runs are too few or too alike to carry a law, or
        under MIN_RUNGS sizes are in both ladders."""
        law = Stack().fit(self.earlier)
        cells = _cells(self.earlier, points)
        if len(cells) < MIN_RUNGS:
            raise UserError(
                f"{len(cells)} sizes are in both ladders, and the trend between them needs"
                f" {MIN_RUNGS}: train the rungs of one in the other"
            )
        # Off the earlier ladder's law each, as sizes are not quite the same.
        before = np.log(self.earlier.loss) - np.log(law.predict(self.earlier))
        now = np.log(points.loss) - np.log(law.predict(points))
        pairs = [_pairs(self.earlier, points, *cell) for cell in cells]
        if min(map(len, pairs)) > 0 and sum(map(len, pairs)) > len(pairs):
            found = [_paired(now[ours] - before[theirs]) for theirs, ours in map(_columns, pairs)]
        else:
            found = [_apart(before[theirs], now[ours]) for theirs, ours in cells]
        places = [float(np.mean(np.log(points.flops[ours]))) for _, ours in cells]
        rows = [(at, *one) for at, one in zip(places, found, strict=True)]
        place, count, ratio, scatter, freedom = np.array(rows).T
        trend = Trend(
            x=place - place.max(),
            count=count,
            y=ratio[None],
            steep=np.ones((1, place.size)),
            scatter=np.array([scatter.sum()]),
            freedom=float(freedom.sum()),
            prior=PRIOR,
        )
        runs = sum(len(ours) for _, ours in cells)
        return BesideFit(law=law, trend=trend, top=float(place.max()), runs=runs)


@dataclass(frozen=True, kw_only=True, eq=False)
class BesideFit:
    """The earlier ladder's laws and the log ratio over log compute, from its largest rung `top` (a
    log) on. runs: of the new ladder that have a counterpart."""

    law: StackFit
    trend: Trend
    top: float
    runs: int

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each law of the earlier ladder by name."""
        return self.law.weights

    @cached_property
    def ratios(self) -> Floats:
        """[3, k] ratio of the losses at each size, quantiles 5, 50, 95 %, by its own runs."""
        return np.exp(self.trend.measured().quantile([0.05, 0.5, 0.95]))

    def ratio(self, target: Points) -> Mixture:
        """Of the log ratio at the target's run, with the noise of that run."""
        return self.trend.measured_at(float(np.log(target.flops[0])) - self.top)

    def mixture(self, target: Points) -> Mixture:
        """What would be measured at the target's run, which must be one."""
        assert len(target) == 1, "the components of a trend are of one target"
        ratio, base = self.ratio(target), self.law.mixture(target)
        weight = np.outer(base.weight, ratio.weight).ravel()
        keep = weight > SHARE * weight.max()
        factor = np.exp(ratio.mean[:, 0])
        mean = np.outer(base.mean[:, 0], factor)
        sd = np.hypot(np.outer(base.sd[:, 0], factor), mean * ratio.sd[:, 0])
        weight = weight[keep] / weight[keep].sum()
        return Mixture(
            weight=weight, mean=mean.ravel()[keep][:, None], sd=sd.ravel()[keep][:, None]
        )


def _cells(earlier: Points, points: Points) -> list[tuple[list[int], list[int]]]:
    """Indices of the runs of one size, of the earlier ladder and of the new one."""
    theirs, ours = (
        np.log(np.stack([p.params_active, p.tokens, p.flops])) for p in (earlier, points)
    )
    found: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(points)):
        near = np.flatnonzero(np.all(abs(theirs - ours[:, i : i + 1]) < ALIKE, axis=0))
        if near.size:
            found.setdefault(tuple(near.tolist()), []).append(i)
    return [(list(near), own) for near, own in found.items()]


def _pairs(
    earlier: Points, points: Points, theirs: list[int], ours: list[int]
) -> list[tuple[int, int]]:
    """Of runs of one size those with the same seed, which share some of their luck: the order of
    the text, where that is the same, and draws of parameters of the same name."""
    by_seed = {float(earlier.seed[i]): i for i in theirs if np.isfinite(earlier.seed[i])}
    return [(by_seed[s], j) for j in ours if (s := float(points.seed[j])) in by_seed]


def _columns(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [i for i, _ in pairs], [j for _, j in pairs]


def _paired(ratio: Floats) -> tuple[float, float, float, float]:
    """Of the log ratios of pairs: how many, their mean, squares about it, how many are free."""
    squares = float(np.sum((ratio - ratio.mean()) ** 2))
    return float(ratio.size), float(ratio.mean()), squares, ratio.size - 1.0


def _apart(theirs: Floats, ours: Floats) -> tuple[float, float, float, float]:
    """Of runs that are no pairs: runs that the noise of the ratio is over, log ratio, squares about
    the two means, how many are free."""
    squares = float(np.sum((theirs - theirs.mean()) ** 2) + np.sum((ours - ours.mean()) ** 2))
    count = 1 / (1 / theirs.size + 1 / ours.size)
    return count, float(ours.mean() - theirs.mean()), squares, theirs.size + ours.size - 2.0
