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
PRIOR = Prior(level=0.5, trend=((0.001, 1e-4), (0.003, 3e-4), (0.01, 1e-3), (0.03, 3e-3)))
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
        sizes = np.stack([np.log(v) for v in _sizes(self.earlier)])
        level = np.log(law.predict(self.earlier))
        cells: dict[tuple[int, ...], list[int]] = {}
        for i in range(len(points)):
            own = np.array([np.log(v[i]) for v in _sizes(points)])
            near = np.flatnonzero(np.all(abs(sizes - own[:, None]) < ALIKE, axis=0))
            if near.size:
                cells.setdefault(tuple(near.tolist()), []).append(i)
        if len(cells) < MIN_RUNGS:
            raise UserError(
                f"{len(cells)} sizes are in both ladders, and the trend between them needs"
                f" {MIN_RUNGS}: train the rungs of one in the other"
            )
        own_level = np.log(law.predict(points))
        rows = [
            _cell(
                np.log(self.earlier.loss[list(theirs)]) - level[list(theirs)],
                np.log(points.loss[ours]) - own_level[ours],
                np.log(points.flops[ours]),
            )
            for theirs, ours in cells.items()
        ]
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
        return BesideFit(
            law=law, trend=trend, top=float(place.max()), runs=sum(map(len, cells.values()))
        )


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


def _sizes(points: Points) -> tuple[Floats, Floats, Floats]:
    return points.params_active, points.tokens, points.flops


def _cell(theirs: Floats, ours: Floats, place: Floats) -> tuple[float, float, float, float, float]:
    """Of runs of one size, off the earlier ladder's law each: log compute, runs that the noise of
    the ratio is over, log ratio, squares about the two means, and how many of these are free."""
    squares = float(np.sum((theirs - theirs.mean()) ** 2) + np.sum((ours - ours.mean()) ** 2))
    count = 1 / (1 / theirs.size + 1 / ours.size)
    free = theirs.size + ours.size - 2
    return float(place.mean()), count, float(ours.mean() - theirs.mean()), squares, free
