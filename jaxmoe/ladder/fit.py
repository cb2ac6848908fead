"""Laws over a ladder's records: what they fit, would have forecast, and which runs are off."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.ladder import Ladder
from jaxmoe.forecast.moe_law import MoeStack, MoeStackFit
from jaxmoe.forecast.points import MIN_BUDGETS, SAME_BUDGET, Points
from jaxmoe.forecast.stack import Stack, StackFit, misfits
from jaxmoe.ladder.collapse import Collapse, collapse
from jaxmoe.ladder.optimal import Optimum, optimal_sizes
from jaxmoe.ladder.targets import Forecasted

__all__ = ["Analysis", "Holdout", "analyse", "answer", "line_of_sizes"]

LEVELS = (0.05, 0.5, 0.95)
ORIGINS = 6  # leave-the-largest-out fits at most: each is one of the whole stack
Interval = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """The largest runs as the smaller ones forecast them. Losses in nats per token.

    Attributes:
        seen: runs fitted; ratio: compute of the largest over that of the largest seen.
        loss: quantiles 5, 50, 95 %; realised: mean over the seeds of the largest.
    """

    seen: int
    ratio: float
    loss: Interval
    realised: float

    @property
    def error(self) -> float:
        return self.loss[1] / self.realised - 1

    @property
    def inside(self) -> bool:
        return self.loss[0] <= self.realised <= self.loss[2]


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A number of experts at the budget, by the joint law."""

    experts: float
    top_k: float
    params_active: float
    params_total: float
    tokens: float
    loss: Interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """All that `ladder fit` says. `fitted` [n]: the law at each record, nats per token."""

    ladder: Ladder
    fit: StackFit | MoeStackFit
    fitted: Floats
    holdouts: list[Holdout]
    misfits: list[int]
    collapse: list[Collapse]
    optimum: Optimum | None
    at_budget: Interval | None  # of a run of the optimum's sizes
    mixed: list[Mixed]
    targets: list[Forecasted]

    @property
    def joint(self) -> bool:
        """Whether experts vary."""
        return isinstance(self.fit, MoeStackFit)


def analyse(
    ladder: Ladder, budget: float | None = None, targets: Sequence[Forecasted] = ()
) -> Analysis:
    """Raises UserError where the runs are too few or too alike to extrapolate."""
    points = ladder.points
    joint = np.unique(np.stack([points.experts, points.top_k]), axis=1).shape[1] > 1
    fit = _fitted(points, joint)
    optimum = at_budget = None
    mixed: list[Mixed] = []
    if budget is not None:
        if isinstance(fit, StackFit):
            optimum = optimal_sizes(points, fit, budget)
            best = Points.of(optimum.params_active[1], optimum.tokens[1], flops=budget)
            at_budget = _interval(fit, best)
        else:
            mixed = _by_experts(points, fit, budget)
    return Analysis(
        ladder=ladder,
        fit=fit,
        fitted=fit.predict(points),
        holdouts=_holdouts(points, joint),
        misfits=[] if joint else misfits(points),
        collapse=collapse(ladder.rows),
        optimum=optimum,
        at_budget=at_budget,
        mixed=mixed,
        targets=[*targets],
    )


def _fitted(points: Points, joint: bool) -> StackFit | MoeStackFit:
    return MoeStack().fit(points) if joint else Stack().fit(points)


def _holdouts(points: Points, joint: bool) -> list[Holdout]:
    """The largest budget from those below it, with ever fewer of these."""
    budgets = points.budgets
    last = points.flops >= budgets[-1] * (1 - 1e-9)
    target = points.take(last)
    found = []
    tops = budgets[MIN_BUDGETS - 1 : -1]
    if tops.size > ORIGINS:
        tops = tops[np.unique(np.linspace(0, tops.size - 1, ORIGINS).round().astype(int))]
    for top in tops[::-1]:
        part = points.take(points.flops <= top * (1 + SAME_BUDGET))
        try:
            fit = _fitted(part, joint)
        except UserError:  # too few or too alike
            continue
        found.append(
            Holdout(
                seen=len(part),
                ratio=float(target.flops.max() / part.flops.max()),
                loss=_interval(fit, target.take([0])),
                realised=float(target.loss.mean()),
            )
        )
    return found


def _interval(fit: StackFit | MoeStackFit, target: Points) -> Interval:
    low, middle, high = fit.mixture(target).quantile(LEVELS)[:, 0]
    return float(low), float(middle), float(high)


def line_of_sizes(points: Points, flops: float) -> float:
    """Active parameters of the ladder's own line at some compute, in log-log."""
    line = np.polyfit(np.log(points.flops), np.log(points.params_active), 1)
    return float(np.exp(np.polyval(line, np.log(flops))))


def _by_experts(points: Points, fit: MoeStackFit, budget: float) -> list[Mixed]:
    """Each seen number of experts at the budget, best first, on the ladder's line of sizes: at a
    fixed compute the joint law has no best size (a product of powers of N and D)."""
    size = line_of_sizes(points, budget)
    top = int(np.argmax(points.flops))
    each = float(points.flops[top] / (points.params_active[top] * points.tokens[top]))
    found = []
    for experts, top_k in sorted({*zip(points.experts, points.top_k, strict=True)}):
        own = points.take((points.experts == experts) & (points.top_k == top_k))
        largest = own.take([int(np.argmax(own.flops))])
        total = float(size * largest.params_total[0] / largest.params_active[0])
        target = Points.of(
            size,
            budget / each / size,
            flops=budget,
            params_total=total,
            experts=experts,
            top_k=top_k,
            router=[str(largest.router[0])],
        )
        found.append(
            Mixed(
                experts=float(experts),
                top_k=float(top_k),
                params_active=size,
                params_total=total,
                tokens=budget / each / size,
                loss=_interval(fit, target),
            )
        )
    return sorted(found, key=lambda one: one.loss[1])


def answer(a: Analysis) -> dict[str, Any]:
    """JSON of an analysis: losses in nats per token, errors relative."""
    optimum = None
    if a.optimum is not None:
        optimum = {**asdict(a.optimum), "loss_of_a_run": a.at_budget}
    return {
        "runs": len(a.ladder.rows),
        "largest_flops": float(a.ladder.points.flops.max()),
        "law": "experts and active parameters" if a.joint else "parameters and tokens",
        "laws": a.fit.weights,
        "rows": [
            {
                **{k: row[k] for k in COLUMNS if k in row},
                "fitted": float(fitted),
                "misfit": i in a.misfits,
                "collapse_sigmas": one.sigmas,
                "collapses": not one.flagged,
            }
            for i, (row, fitted, one) in enumerate(
                zip(a.ladder.rows, a.fitted, a.collapse, strict=True)
            )
        ],
        "leave_the_largest_out": [
            {**asdict(h), "error": h.error, "inside90": h.inside} for h in a.holdouts
        ],
        "optimum": optimum,
        "experts_at_budget": [asdict(m) for m in a.mixed],
        "targets": [
            {**asdict(t), "error": t.error, "half_width": t.half_width, "inside90": t.inside}
            for t in a.targets
        ],
    }


COLUMNS = (
    *("family", "rung", "seed", "params_active", "params_total", "tokens", "flops", "experts"),
    *("top_k", "loss", "wall_seconds"),
)


def flagged(a: Analysis) -> Sequence[tuple[Mapping[str, Any], str]]:
    """Records that are out of line, and why."""
    found = []
    for i, (row, one) in enumerate(zip(a.ladder.rows, a.collapse, strict=True)):
        if i in a.misfits:
            found.append((row, "its loss does not fall onto the others"))
        if one.flagged:
            way = "further" if one.deviation > 0 else "less"
            why = f"its curve does not collapse: {one.sigmas:.1f} sigmas, falls {way} in the end"
            found.append((row, why))
    return found
