"""Tolerant readers of a run directory.

A run in progress is the usual case: files may be missing and the last line of any of them may be
torn, which is no error. An unreadable line that others follow is one: the record was damaged.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.outside import finite, group, json_object, loads

__all__ = ["Forecast", "Quantiles", "Row", "Run", "group", "number", "read"]

Row = dict[str, Any]
LEVELS = ("median", "q05", "q25", "q75", "q95")


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of a predicted held-out loss, nats per token."""

    median: float
    q05: float
    q25: float
    q75: float
    q95: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One registered forecast of the final loss, made from what was known at `cutoff_step`."""

    index: int
    time: Any
    law: str
    cutoff_step: float
    cutoff_tokens: float | None
    target_step: float
    loss: Quantiles
    path: tuple[tuple[float, Quantiles], ...]  # (step, loss there), from the cut-off to the target


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds. `metrics` and `evals` rise in step, re-run steps once."""

    path: Path
    name: str
    fingerprint: str
    config: Row
    environment: Row
    metrics: list[Row]
    evals: dict[str, list[Row]]  # held-out set -> its results; the first set is the forecast's
    events: list[Row]
    forecasts: list[Forecast]
    outcome: float | None  # final held-out loss, nats per token

    @property
    def heldout(self) -> list[Row]:
        return next(iter(self.evals.values()), [])

    @property
    def step(self) -> float:
        """The last step that left a trace in metrics or evals."""
        return max(rows[-1]["step"] for rows in (self.metrics, *self.evals.values()) if rows)

    @property
    def target_step(self) -> float | None:
        planned = number(group(self.config, "train"), "steps")
        return planned or (self.forecasts[-1].target_step if self.forecasts else None)


def read(run_dir: Path) -> Run:
    """
    Raises:
        UserError: no such directory, no metrics in it, or a damaged record (names file and line).
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    metrics = _surviving(_stepped(run_dir / "metrics.jsonl"))
    if not metrics:
        raise UserError(f"{run_dir}: no metrics yet; metrics.jsonl is missing or empty")
    record = _json(run_dir / "config.json")
    config = group(record, "config")
    forecasts, outcome = _register(run_dir / "forecasts.jsonl")
    return Run(
        path=run_dir,
        name=str(config.get("name") or run_dir.resolve().name),
        fingerprint=str(record.get("fingerprint", "")),
        config=config,
        environment=_json(run_dir / "environment.json"),
        metrics=metrics,
        evals=_evals(run_dir / "evals.jsonl"),
        events=[row for _, row in _lines(run_dir / "events.jsonl")],
        forecasts=forecasts,
        outcome=outcome,
    )


def number(row: Row, key: str) -> float | None:
    """A finite number, or None: a diverged run logs NaN, which no axis can show."""
    value = row.get(key)
    return value if finite(value) else None


def _json(path: Path) -> Row:
    if not path.is_file():
        return {}
    return json_object(path)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, object) of every line; `where` is what an error message names."""
    if not path.is_file():
        return
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    numbered = [(n, line) for n, line in lines if line.strip()]
    for n, line in numbered:
        where = f"{path}, line {n}"
        try:
            row = loads(line)
        except ValueError as error:
            if n == numbered[-1][0]:
                return
            raise UserError(f"{where}: not readable as JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds {type(row).__name__}, not an object")
        yield where, row


def _stepped(path: Path) -> Iterator[Row]:
    for where, row in _lines(path):
        _need(row, "step", where)
        yield row


def _surviving(rows: Iterable[Row]) -> list[Row]:
    """Drops the steps that a resume from an older checkpoint ran again."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _evals(path: Path) -> dict[str, list[Row]]:
    sets: dict[str, list[Row]] = {}
    for row in _stepped(path):
        sets.setdefault(str(row.get("set", "held-out")), []).append(row)
    return {name: _surviving(rows) for name, rows in sets.items()}


def _register(path: Path) -> tuple[list[Forecast], float | None]:
    forecasts, outcome = [], None
    for where, row in _lines(path):
        if row.get("kind") == "forecast":
            forecasts.append(_forecast(row, where, len(forecasts)))
        elif row.get("kind") == "outcome":
            outcome = _need(group(row, "loss"), "realised", where)
    return forecasts, outcome


def _forecast(row: Row, where: str, position: int) -> Forecast:
    loss = _quantiles(group(row, "loss"), where)
    target = _need(row, "target_step", where)
    steps = row.get("path")
    points = (
        [point for point in steps if isinstance(point, dict)] if isinstance(steps, list) else []
    )
    path = tuple((_need(point, "step", where), _quantiles(point, where)) for point in points)
    return Forecast(
        index=int(number(row, "index") or position),
        time=row.get("time"),
        law=str(row.get("law", "")),
        cutoff_step=_need(row, "cutoff_step", where),
        cutoff_tokens=number(row, "cutoff_tokens"),
        target_step=target,
        loss=loss,
        path=path or ((target, loss),),
    )


def _quantiles(row: Row, where: str) -> Quantiles:
    return Quantiles(**{level: _need(row, level, where) for level in LEVELS})


def _need(row: Row, key: str, where: str) -> float:
    value = number(row, key)
    if value is None:
        raise UserError(f"{where}: {key}={row.get(key)!r} should be a finite number")
    return value
