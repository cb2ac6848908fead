"""What lies beside a register and must agree with it: evals, schedule, events, checkpoints.

All are read as plain JSON: a register can be verified where no jax is.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Schedule, canonical_observations
from jaxmoe.outside import finite, json_object, loads, reading

__all__ = [
    "checkpoint_heads",
    "eval_problem",
    "observations",
    "parsed",
    "postdated",
    "read_evals",
    "read_schedule",
    "run_problems",
    "when",
]

Record = Mapping[str, Any]


def read_evals(path: str | Path) -> list[dict[str, Any]]:
    """Objects of an evals.jsonl, in file order; an unfinished last line is left out.

    Raises:
        UserError: no such file, or a line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a run directory that has one")
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = parsed(line)
        if row is None or not _is_eval(row):
            raise UserError(
                f"{path}: line {number} is no eval: step, tokens, set, set_fingerprint, nll"
            )
        rows.append(row)
    return rows


def _is_eval(row: Record) -> bool:
    """Its values are compared and summed from here on."""
    if not {"step", "tokens", "set", "set_fingerprint", "nll"} <= row.keys():
        return False
    words = isinstance(row["set"], str) and isinstance(row["set_fingerprint"], str)
    loss = row["nll"]  # not finite: of a run that diverged
    fits = loss is None or isinstance(loss, float) or finite(loss)
    return words and fits and type(row["step"]) is int and finite(row["step"])


def observations(
    rows: Sequence[Record], *, set_fingerprint: str, until: int
) -> tuple[list[int], list[float]]:
    """Steps and losses of one held-out set up to a step, as a fit should see them.

    Step 0 is left out: no law of training speaks of it. A row whose step is not beyond the last one
    replaces what came from there on: that is what a resume or a rollback does to a run.
    """
    kept: list[tuple[int, float]] = []
    for row in rows:
        if row["set_fingerprint"] == set_fingerprint and 0 < row["step"] <= until:
            nll = float("nan") if row["nll"] is None else float(row["nll"])
            kept = [pair for pair in kept if pair[0] < row["step"]] + [(int(row["step"]), nll)]
    kept = [pair for pair in kept if math.isfinite(pair[1])]
    return [step for step, _ in kept], [loss for _, loss in kept]


def read_schedule(path: Path) -> Schedule:
    """The plan that a run's schedule.json holds.

    Raises:
        UserError: no such file, or it is malformed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the trainer writes it when a run starts")
    try:
        plan = json_object(path)
        if "tokens" in plan:  # a run whose batch grows
            return Schedule(lr=np.asarray(plan["lr"]), tokens=np.asarray(plan["tokens"]))
        return Schedule.of(plan["lr"], tokens_per_step=float(plan["tokens_per_step"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: {error!r}; it needs lr (a list), and tokens_per_step or tokens (a list)"
        ) from None


def when(text: Any) -> datetime:
    """A moment written as ISO 8601 with its zone.

    Raises:
        UserError: it is none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UserError(f"time={text!r}: write ISO 8601 with a zone, as 2026-11-22T21:00:00+00:00")
    return moment.astimezone(UTC)


def postdated(record: Record) -> str | None:
    """What of a forecast's inputs is later than its cut-off, in words; None: nothing is.

    Runs that it rests on must be finished when the line is written; evals are compared by
    `eval_problem`.
    """
    made = when(record.get("time"))
    for key in ("siblings", "earlier"):
        runs = record.get(key, [])
        if not isinstance(runs, list) or not all(isinstance(s, dict) for s in runs):
            raise UserError(f"{key}={runs!r}: it must be a list of objects")
        for run in runs:
            if when(run.get("finished")) > made:
                return (
                    f"{key}: {str(run.get('sha256'))[:12]} finished at {run['finished']},"
                    f" after this forecast of {record['time']}: look-ahead"
                )
    return None


def eval_problem(record: Record, rows: Sequence[Record]) -> str | None:
    """How a forecast or an outcome disagrees with the evals, in words; None: it does not."""
    try:
        return _eval_problem(record, rows)
    except (AttributeError, TypeError, ValueError):  # an edited line may hold anything
        return f"a {record.get('kind')} whose values are of other types: it was edited"


def _eval_problem(record: Record, rows: Sequence[Record]) -> str | None:
    name, cutoff = record.get("set_fingerprint"), record.get("cutoff_step")
    if not isinstance(name, str):
        return None
    if record.get("kind") == "forecast" and isinstance(cutoff, int):
        count = record.get("evals_lines")
        seen = rows[:count] if isinstance(count, int) else rows
        steps, losses = observations(seen, set_fingerprint=name, until=cutoff)
        sha256 = hashlib.sha256(canonical_observations(steps, losses).encode()).hexdigest()
        if sha256 != record.get("observations_sha256"):
            return (
                f"evals.jsonl up to step {cutoff} is not what this forecast saw: evals were edited"
            )
    if record.get("kind") == "outcome":
        target = record.get("target_step")
        steps, losses = observations(rows, set_fingerprint=name, until=target or 0)
        realised = (record.get("loss") or {}).get("realised")
        measured = losses[-1] if steps and steps[-1] == target else None
        if measured != realised:
            return f"outcome {realised!r} is not the eval at step {target}, which is {measured!r}"
    return None


def run_problems(folder: Path, records: Sequence[Record | None]) -> Iterator[tuple[int, str]]:
    """(line from 1, what) of forecasts that the schedule or the events of the run contradict."""
    plan, began = _schedule(folder), _began(folder)
    for number, record in enumerate(records, 1):
        if record is None or record.get("kind") != "forecast":
            continue
        try:
            if (late := postdated(record)) is not None:
                yield number, late
        except UserError as error:
            yield number, str(error)
            continue
        known = record.get("schedule")
        if known is not None and plan is not None and not _fits(plan, known):
            yield number, "schedule.json is not the learning rates that this forecast was made for"
        before = record.get("cutoff_step") == 0
        if before and began is not None and when(record["time"]) > began:
            yield number, f"it is of before the run, which began at {began.isoformat()}: look-ahead"


def checkpoint_heads(folder: Path) -> Iterator[tuple[int, Any]]:
    """(step, what it holds of the register) of each checkpoint; older ones hold nothing."""
    for meta in sorted((folder / "checkpoints").glob("*/meta/metadata")):
        step = meta.parent.parent.name
        if step.isdecimal() and meta.is_file():
            found = parsed(meta.read_bytes()) or {}
            if found.get("register") is not None:
                yield int(step), found["register"]


def _schedule(folder: Path) -> Schedule | Literal[False] | None:
    """False where it is damaged: then it is no forecast's; None where there is none."""
    if not (folder / "schedule.json").exists():
        return None
    try:
        return read_schedule(folder / "schedule.json")
    except UserError:
        return False


def _fits(plan: Schedule | Literal[False], known: Any) -> bool:
    try:
        return bool(plan) and plan.agrees(known)
    except (AttributeError, TypeError, ValueError):  # an edited line may hold anything
        return False


def _began(folder: Path) -> datetime | None:
    """The first start of the run."""
    events = folder / "events.jsonl"
    if events.is_file():
        for line in events.read_bytes().split(b"\n")[:-1]:
            row = parsed(line) or {}
            if row.get("what") == "start":
                with reading(events):
                    return when(row.get("time"))
    return None


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is none."""
    try:
        value = loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
