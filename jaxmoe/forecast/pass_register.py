"""Pass rates of a target model, registered before it is tried and scored after it.

Counts are JSON lines: compute (training FLOPs of the model), bucket (of difficulty), task, passes,
tries. Every model has the same tasks. The register is `pass_rates.jsonl`, a chain of its own:
its lines are forecasts of -E[log pass rate] by bucket, and an outcome closes it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.pass_rate import PassLaw, mean_log_pass
from jaxmoe.forecast.provenance import code_fingerprint
from jaxmoe.forecast.register import LEVELS
from jaxmoe.outside import loads, needed, reading

__all__ = [
    "PASS_RATES",
    "Counts",
    "PassScore",
    "read_counts",
    "register_outcome",
    "register_passes",
    "score_passes",
]

PASS_RATES = "pass_rates.jsonl"
LAW = "power law of -E[log p], beta-binomial"
SAME_COMPUTE = 1e-6
NEEDED = ("compute", "bucket", "task", "passes", "tries")


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Attributes:
    flops: [models] rising.
    solved, tries: by bucket [models, tasks].
    tasks_sha256: of the names of buckets and tasks.
    sha256: of all counts, whatever their order in the file.
    """

    flops: np.ndarray
    solved: Mapping[str, np.ndarray]
    tries: Mapping[str, np.ndarray]
    tasks_sha256: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PassScore:
    """A bucket's forecast against its outcome; all but the flags of -E[log pass rate], in nats."""

    index: int
    bucket: str
    flops: float
    median: float
    q05: float
    q95: float
    realised: float
    error: float  # (median - realised) / realised
    inside50: bool
    inside90: bool


def read_counts(path: str | Path) -> Counts:
    """Raises UserError: no such file, a damaged line, a task twice, or models of other tasks."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give JSON lines of {', '.join(NEEDED)}")
    table: dict[float, dict[tuple[str, str], tuple[int, int]]] = {}
    with reading(path):
        text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            flops, task, counts = _row(f"{path}: line {number}", line)
            if task in table.setdefault(flops, {}):
                where = f"bucket {task[0]!r}, task {task[1]!r} at compute {flops:g}"
                raise UserError(f"{path}: line {number}: {where} is there twice; add them up")
            table[flops][task] = counts
    if not table:
        raise UserError(f"{path}: no counts; give JSON lines of {', '.join(NEEDED)}")
    models = sorted(table)
    tasks = sorted(table[models[0]])
    for flops in models:
        if odd := sorted(set(tasks) ^ set(table[flops])):
            raise UserError(
                f"{path}: task {odd[0][1]!r} of bucket {odd[0][0]!r} is not tried by the models of"
                f" both {models[0]:g} and {flops:g} FLOPs; every model needs the same tasks"
            )
    chosen = {bucket: [t for t in tasks if t[0] == bucket] for bucket, _ in tasks}
    rows = [[flops, *task, *table[flops][task]] for flops in models for task in tasks]

    def of(which: int) -> dict[str, np.ndarray]:
        return {
            bucket: np.array([[table[flops][task][which] for task in names] for flops in models])
            for bucket, names in chosen.items()
        }

    return Counts(
        flops=np.array(models),
        solved=of(0),
        tries=of(1),
        tasks_sha256=_sha256([list(task) for task in tasks]),
        sha256=_sha256(rows),
    )


def register_passes(
    counts: Counts, flops: float, run_dir: str | Path, *, correct: str | None = None
) -> dict[str, Any]:
    """Appends the forecast of every bucket at `flops`; returns the line.

    Raises:
        UserError: counts of the target itself or of a larger model, too few models, one forecast of
            this target is there and no `correct` (a reason), or as `register.append`.
    """
    largest = float(counts.flops[-1])
    if not (np.isfinite(flops) and flops > largest * (1 + SAME_COMPUTE)):
        raise UserError(
            f"--flops {flops:g}: the counts go up to {largest:g} FLOPs; a forecast is of a larger"
            " model, made without its own counts"
        )
    path = Path(run_dir) / PASS_RATES
    known = [one for one in _forecasts(path) if one["flops"] == flops]
    if bool(known) != (correct is not None):
        line = f"line {known[-1]['index'] + 1} is" if known else "there is not"
        mend = "give --correct REASON" if known else "leave --correct out"
        raise UserError(f"{path}: {line} a forecast at {flops:g} FLOPs already; {mend}")
    correction = {"corrects": known[-1]["index"], "reason": correct} if known else {}
    return register.append(
        path,
        {
            "kind": "pass rates",
            "tasks_sha256": counts.tasks_sha256,
            "flops": float(flops),
            "buckets": {name: _quantiles(counts, name, flops) for name in counts.solved},
            "code": code_fingerprint(),
            "law": LAW,
            "inputs_sha256": counts.sha256,
            "largest_flops": largest,
            **correction,
        },
    )


def register_outcome(counts: Counts, run_dir: str | Path) -> dict[str, Any]:
    """Appends what the target's own counts say; closes the register.

    Raises:
        UserError: counts of more than one model, no forecast at its compute, or of other tasks.
    """
    path = Path(run_dir) / PASS_RATES
    if counts.flops.size != 1:
        raise UserError(f"counts of {counts.flops.size} models; an outcome is of the target alone")
    flops = float(counts.flops[0])
    forecasts = _forecasts(path)
    alike = [one for one in forecasts if abs(one["flops"] / flops - 1) <= SAME_COMPUTE]
    if not alike:
        there = ", ".join(f"{one['flops']:g}" for one in forecasts) or "none"
        raise UserError(f"{path} has no forecast at {flops:g} FLOPs (there is: {there})")
    if alike[-1]["tasks_sha256"] != counts.tasks_sha256:
        raise UserError(
            f"{path}: the forecast is of other tasks or buckets (tasks_sha256"
            f" {alike[-1]['tasks_sha256'][:12]}, not {counts.tasks_sha256[:12]})"
        )
    realised = {
        name: {"realised": mean_log_pass(counts.solved[name][0], counts.tries[name][0])[0]}
        for name in counts.solved
    }
    return register.append(
        path,
        {
            "kind": "pass rates outcome",
            "tasks_sha256": counts.tasks_sha256,
            "flops": alike[-1]["flops"],
            "buckets": realised,
            "inputs_sha256": counts.sha256,
        },
    )


def score_passes(records: Sequence[Mapping[str, Any]]) -> list[PassScore]:
    """Each bucket of each forecast at the outcome's compute, in order.

    Raises:
        UserError: no outcome yet.
    """
    outcome = next((r for r in records if r.get("kind") == "pass rates outcome"), None)
    if outcome is None:
        raise UserError("no outcome of the pass rates yet; register the target's counts first")
    with reading("the register of pass rates"):
        return [
            _score(record, name, loss, float(outcome["buckets"][name]["realised"]))
            for record in records
            if record["kind"] == "pass rates" and record["flops"] == outcome["flops"]
            for name, loss in record["buckets"].items()
        ]


def _score(
    record: Mapping[str, Any], bucket: str, loss: Mapping[str, float], realised: float
) -> PassScore:
    return PassScore(
        index=record["index"],
        bucket=bucket,
        flops=record["flops"],
        median=loss["median"],
        q05=loss["q05"],
        q95=loss["q95"],
        realised=realised,
        error=loss["median"] / realised - 1,
        inside50=loss["q25"] <= realised <= loss["q75"],
        inside90=loss["q05"] <= realised <= loss["q95"],
    )


def _forecasts(path: Path) -> list[dict[str, Any]]:
    lines = register.read(path) if path.exists() else []
    made = [line for line in lines if line.get("kind") == "pass rates"]
    for line in made:
        needed(line, {"flops": float, "index": int, "tasks_sha256": str, "buckets": dict}, path)
    return made


def _quantiles(counts: Counts, bucket: str, flops: float) -> dict[str, float]:
    fit = PassLaw().fit(counts.flops, list(counts.solved[bucket]), list(counts.tries[bucket]))
    values = fit.quantile([flops], list(LEVELS.values()))[:, 0]
    return {name: float(value) for name, value in zip(LEVELS, values, strict=True)}


def _row(where: str, line: str) -> tuple[float, tuple[str, str], tuple[int, int]]:
    try:
        row = loads(line)
        flops, solved, tries = float(row["compute"]), row["passes"], row["tries"]
        task = (str(row["bucket"]), str(row["task"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {error!r}; it needs {', '.join(NEEDED)}") from None
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"{where}: compute={flops:g} is no number of FLOPs above 0")
    if not (type(solved) is type(tries) is int and 0 <= solved <= tries and tries > 0):
        raise UserError(f"{where}: passes={solved!r} of tries={tries!r}; whole numbers, 0 to tries")
    return flops, task, (solved, tries)


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, separators=(",", ":")).encode()).hexdigest()
