"""Registers the forecast of a run from a ladder: before it starts, or at its last eval so far."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.beside import Beside
from jaxmoe.forecast.curve import Floats, Run, observations_sha256
from jaxmoe.forecast.hook_api import SAMPLES, PathPoint, Quantiles, named
from jaxmoe.forecast.ladder import SAME, Ladder, Target
from jaxmoe.forecast.ladder_path import LEVELS, path_from_siblings, shares
from jaxmoe.forecast.mixture import Mixture
from jaxmoe.forecast.moe_law import MoeStack
from jaxmoe.forecast.points import Points, refuse_thin
from jaxmoe.forecast.provenance import code_fingerprint
from jaxmoe.forecast.siblings import SiblingLaw
from jaxmoe.forecast.stack import Stack, misfits
from jaxmoe.outside import needed

__all__ = ["LadderForecast", "forecast_target", "register_target", "registered"]

SMALLEST = 0.5  # target's compute over the largest run's: the laws trust runs near the largest
MANY = 200  # runs from which on the leave-one-out check of each would take long
CURVE_POINTS = 64  # of a sibling's curve, kept in the register for the alarms


@dataclass(frozen=True, kw_only=True)
class LadderForecast:
    """A forecast of a target's final loss.

    Attributes:
        law, laws: its name, and the weight of each member.
        loss: at the end, nats per token; `path`: from the first share that the siblings tell of.
        extrapolation: the target's compute over the largest run's.
        misfits: indices of runs that do not fall onto the others.
        run: the target and what was seen of it.
    """

    law: str
    laws: Mapping[str, float]
    loss: Quantiles
    path: tuple[PathPoint, ...]
    extrapolation: float
    misfits: tuple[int, ...]
    run: Run

    @property
    def cutoff_step(self) -> int:
        """The last step that it knows a loss of; 0: none."""
        return int(self.run.steps[-1]) if self.run.steps.size else 0


def forecast_target(
    ladder: Ladder, target: Target, seen: Run | None = None, earlier: Ladder | None = None
) -> LadderForecast:
    """The final loss and the path there; of a run that goes on (`seen`), its rest.

    Before a start: the stacked laws over compute (`stack`), or, where experts, top-k or router
    differ among the runs and the target, those over experts too (`moe_law`); with `earlier`, a
    ladder with larger runs, the law of losses beside those (`beside`). After a start: siblings.

    Raises:
        UserError: losses are not comparable, runs are too few or too alike, the target is far below
            the largest run, or it has begun and there are no curves.
    """
    ladder.check(target)
    if earlier is not None:
        earlier.refuse_own_run(target)
    refuse_thin(ladder.points)
    point = target.point
    ratio = float(point.flops[0] / ladder.points.flops.max())
    if ratio < SMALLEST:
        raise UserError(
            f"the target has {ratio:.2g} of the largest run's compute, and the laws trust runs "
            "near the largest; leave the larger runs out of the records"
        )
    run = Run(schedule=target.schedule, name=target.name) if seen is None else seen
    run = dataclasses.replace(run, params_active=float(target.numbers["params_active"]))
    alike = len(ladder.points) <= MANY and _one_shape(ladder.points, point)
    odd = tuple(misfits(ladder.points)) if alike else ()
    if run.steps.size:
        if earlier is not None:
            raise UserError(
                f"{target.name} has begun: its rest is told by the ladder's curves alone"
            )
        law, laws = "siblings", {"siblings": 1.0}
        mixture = SiblingLaw().fit(run, ladder.siblings).mixture()
    else:
        law, laws, mixture = _before_start(ladder.points, point, earlier)
    loss = Quantiles(**named(mixture.quantile(LEVELS)[:, 0]))
    end = mixture.sample(SAMPLES, np.random.default_rng([0, 1]))[:, 0]
    curves = (*ladder.siblings, *(earlier.siblings if earlier is not None else ()))
    path = path_from_siblings(
        curves,
        target.schedule,
        float(target.numbers["params_active"]),
        end,
        loss,
        target.eval_steps,
        after=int(run.steps[-1]) if run.steps.size else 0,
    )
    return LadderForecast(
        law=law,
        laws=laws,
        loss=loss,
        path=path,
        extrapolation=ratio,
        misfits=odd,
        run=run,
    )


def register_target(
    ladder: Ladder,
    target: Target,
    run_dir: str | Path,
    *,
    earlier: Ladder | None = None,
    correct: str | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Appends the forecast to RUN_DIR/forecasts.jsonl and returns the line.

    `jaxmoe.train` with the same config and directory goes on from it: this path is its frozen one.

    Args:
        earlier: a ladder with larger runs of the same sizes, on other text or by another recipe.
        correct: the reason for a new line where one of this cut-off is there already.
        now: the time of the line.

    Raises:
        UserError: as `forecast_target`; what it rests on is later than its cut-off; another run's
            forecast is there, or one of this cut-off and no `correct`; or as `register.append`.
    """
    path = Path(run_dir) / register.FORECASTS
    time = (now or datetime.now(UTC)).astimezone(UTC)
    lines = registered(path, target.run)
    rows = _evals(path)
    made = forecast_target(ladder, target, _seen(target, rows), earlier)
    known = [one["index"] for one in lines if one["cutoff_step"] == made.cutoff_step]
    if known and correct is None:
        raise UserError(
            f"{path}: line {known[-1] + 1} is the forecast from a ladder at step"
            f" {made.cutoff_step} already; a correction is a new line: --correct REASON"
        )
    if correct is not None and not known:
        raise UserError(
            f"--correct {correct!r}: {path} has no forecast from a ladder at step"
            f" {made.cutoff_step} to correct; leave it out"
        )
    correction = {"corrects": known[-1], "reason": correct} if known else {}
    times = {"time": time.isoformat(timespec="milliseconds")}
    record = _record(ladder, target, made, evals_lines=len(rows))
    if earlier is not None:
        record["earlier"] = [{**one, **earlier.common} for one in earlier.named()]
    return register.append(path, {**record, **times, **correction})


def registered(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """The forecasts from ladders in a register; [] where there is none.

    Raises:
        UserError: one is of another run than `run`, the fingerprint of what decides losses.
    """
    if not path.exists():
        return []
    lines = register.read(path)
    lines = [one for one in lines if one.get("kind") == "forecast" and one.get("siblings")]
    for number, one in enumerate(lines, 1):
        needed(one, {"index": int, "cutoff_step": int}, f"{path}, forecast {number} from a ladder")
        if run is not None and one.get("run") != run:
            raise UserError(
                f"{path}: line {one['index'] + 1} is the forecast of a run with another config"
                f" ({one.get('run')}, not {run}); give another --run-dir"
            )
    return lines


def _before_start(
    points: Points, target: Points, earlier: Ladder | None
) -> tuple[str, dict[str, float], Mixture]:
    """Law, weights and what it says. Ladders of one shape of experts need no law of experts."""
    if earlier is not None:
        for runs, of in ((points, target), (earlier.points, earlier.points)):
            if not _one_shape(runs, of):
                raise UserError(
                    "--earlier: experts, top-k or router differ within a ladder or from the target,"
                    " and runs are paired by sizes alone; give ladders of one shape each"
                )
        beside = Beside(earlier=earlier.points).fit(points)
        return Beside.name, beside.weights, beside.mixture(target)
    alike = _one_shape(points, target)
    fit = (Stack() if alike else MoeStack()).fit(points)
    law = "stack over compute" if alike else "stack over experts"
    return law, fit.weights, fit.mixture(target)


def _one_shape(points: Points, target: Points) -> bool:
    """Whether experts, top-k and router are the same in all."""
    shapes = [
        (float(p.experts[i]), float(p.top_k[i]), str(p.router[i]))
        for p in (points, target)
        for i in range(len(p))
    ]
    return len(set(shapes)) == 1


def _evals(path: Path) -> list[dict[str, Any]]:
    evals = path.with_name("evals.jsonl")
    return register.read_evals(evals) if evals.exists() else []


def _seen(target: Target, rows: Sequence[Mapping[str, Any]]) -> Run:
    """What was measured of the target so far."""
    steps, loss = register.observations(
        rows, set_fingerprint=target.identity["set_fingerprint"], until=target.schedule.steps
    )
    if steps and steps[-1] == target.schedule.steps:
        raise UserError(f"{target.name} has ended: its loss is known")
    return Run(
        schedule=target.schedule,
        steps=np.array(steps, np.int64),
        loss=np.array(loss, np.float64),
        name=target.name,
    )


def _record(
    ladder: Ladder, target: Target, made: LadderForecast, *, evals_lines: int
) -> dict[str, Any]:
    plan, cutoff = target.schedule, made.cutoff_step
    tokens = float(plan.tokens[cutoff - 1]) if cutoff else 0.0
    identity = {key: target.identity[key] for key in (*SAME, "leaking")}
    return {
        "kind": "forecast",
        "config": target.config,
        "run": target.run,
        **identity,
        "metric": register.METRIC,
        "code": code_fingerprint(),
        "law": made.law,
        "laws": dict(made.laws),
        "step": cutoff,
        "tokens": tokens,
        "cutoff_step": cutoff,
        "cutoff_tokens": tokens,
        "horizon_steps": plan.steps - cutoff,
        "target_step": plan.steps,
        "target_tokens": float(plan.tokens[-1]),
        "target": dict(target.numbers),
        "schedule": {**plan.summary(), "parameters": dict(target.rates)},
        "loss": dataclasses.asdict(made.loss),
        "path": [dataclasses.asdict(point) for point in made.path],
        "extrapolation": made.extrapolation,
        "misfits": [ladder.hashes[i] for i in made.misfits],
        "siblings": _kept(ladder),
        "diverged": ladder.diverged,
        "observations": int(made.run.steps.size),
        "observations_sha256": observations_sha256(made.run),
        "evals_lines": evals_lines,
    }


def _kept(ladder: Ladder) -> list[dict[str, Any]]:
    """Each record's hash and numbers, and its curve by shares of its tokens."""
    entries, runs = ladder.named(), iter(ladder.siblings)
    for entry, row in zip(entries, ladder.rows, strict=True):
        if row.get("curve"):
            run = next(runs)
            at = np.unique(np.round(np.linspace(0, run.steps.size - 1, CURVE_POINTS)).astype(int))
            pairs = np.stack([shares(run)[at], run.loss[at]], axis=1)
            entry["curve"] = _plain(pairs)
    return entries


def _plain(pairs: Floats) -> list[list[float]]:
    return [[float(share), float(loss)] for share, loss in pairs]
