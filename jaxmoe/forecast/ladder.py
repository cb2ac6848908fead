"""Records of a ladder: finished runs of one recipe on one text, each with its curve.

One JSON object a line (`jaxmoe.ladder` writes them): `params_active`, `tokens`, `loss`, `finished`,
COMMON, and where known what `Points` has and `curve`, [[step, tokens, loss], ...] of the held-out
set. Losses that are not comparable are refused: the difference is named by key and both values.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Run, Schedule
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.register_beside import when
from jaxmoe.outside import loads, reading

__all__ = ["COMMON", "Ladder", "Target", "read_ladder", "record_sha256"]

# A law of losses on different text, or in tokens of different tokenizers, is a law of nothing.
SAME = ("set", "set_fingerprint", "train_fingerprint", "tokenizer_fingerprint")
COMMON = (*SAME, "recipe_fingerprint")
NEEDED = (*COMMON, "params_active", "tokens", "loss", "finished")
KEY = ("family", "rung", "seed", "tokens")  # of a point; a later line of the same one stands
SHAPE = ("params_total", "unique_tokens", "flops", "experts", "top_k")
NAMED = ("family", "rung", "seed", "flops", "params_active", "tokens", "finished")
ENDS_ALIKE = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A run that is planned; `jaxmoe.run.target.target_of` counts it from a config.

    Attributes:
        config: fingerprint of its config; `run`: of that part of it which decides losses.
        numbers: params_active, tokens, and what else of `Points` is known.
        identity: SAME, and `leaking`, documents of the training text that repeat the set.
        recipe_fingerprint: None where it is not known; then it is not compared.
        schedule: of the whole run; `rates`: its parameters, for a reader of the register.
        eval_steps: steps after which the held-out loss will be measured, the last one included.
    """

    name: str
    config: str
    run: str
    numbers: Mapping[str, Any]
    identity: Mapping[str, Any]
    schedule: Schedule
    rates: Mapping[str, Any] = field(default_factory=dict)
    eval_steps: Sequence[int] = ()
    recipe_fingerprint: str | None = None

    @property
    def point(self) -> Points:
        """[1] without a loss."""
        rest = {k: [self.numbers[k]] for k in SHAPE if self.numbers.get(k) is not None}
        n, d = self.numbers["params_active"], self.numbers["tokens"]
        return Points.of([n], [d], router=[str(self.numbers.get("router") or "")], **rest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ladder:
    """n comparable runs.

    Attributes:
        rows: [n] records as they were written; `hashes`: [n] SHA-256 of their canonical JSON.
        points: [n].
        siblings: those that have a curve. Their schedules have steps and tokens alone: the rates of
            a finished run are not in its record.
        common: COMMON, by key.
        diverged: records without a finite loss, left out.
    """

    rows: tuple[Mapping[str, Any], ...]
    hashes: tuple[str, ...]
    points: Points
    siblings: tuple[Run, ...]
    common: Mapping[str, Any]
    diverged: int = 0

    def check(self, target: Target) -> None:
        """Raises UserError where the target's loss is not comparable, or in the records."""
        wanted = {**target.identity, "recipe_fingerprint": target.recipe_fingerprint}
        for key in COMMON:
            if wanted[key] is not None and wanted[key] != self.common[key]:
                raise UserError(
                    f"{key}: the records have {self.common[key]!r} and the target {wanted[key]!r}: "
                    "their losses cannot be compared; train the ladder on what the target is"
                )
        self.refuse_own_run(target)

    def refuse_own_run(self, target: Target) -> None:
        """Raises UserError where a record is of the target itself."""
        for row in self.rows:
            if row.get("config_fingerprint") == target.config:
                raise UserError(
                    f"the records hold the target's own run (config_fingerprint {target.config}): "
                    "that is its outcome, not a forecast; leave it out"
                )

    def named(self) -> list[dict[str, Any]]:
        """[n] what a register keeps of each record, its hash first."""
        return [
            {"sha256": sha256, **{k: row[k] for k in NAMED if k in row}}
            for sha256, row in zip(self.hashes, self.rows, strict=True)
        ]


def record_sha256(record: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a record.

    Raises:
        UserError: a value that JSON has not, as NaN.
    """
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"a ladder record is no plain JSON: {error}; mend it") from None
    return hashlib.sha256(text.encode()).hexdigest()


def read_ladder(paths: Sequence[str | Path]) -> Ladder:
    """The runs of files of records, in order.

    Raises:
        UserError: no such file, an incomplete or damaged record, or runs that differ in COMMON.
    """
    found: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for path in map(Path, paths):
        for where, row in _rows(path):
            _check(where, row)
            key = tuple(row.get(k) for k in KEY)
            found.pop(key, None)
            found[key] = (where, row)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no runs; train a ladder first")
    (first, one), *_ = found.values()
    for where, row in found.values():
        for key in COMMON:
            if row[key] != one[key]:
                raise UserError(
                    f"{where}: {key} is {row[key]!r}, and {one[key]!r} in {first}: their losses "
                    "cannot be compared; keep runs of one text, tokenizer and recipe in a file"
                )
    kept = [(where, row) for where, row in found.values() if row["loss"] is not None]
    rows = [row for _, row in kept]
    if not rows:
        raise UserError(f"{first}: no run has a loss; leave out those that diverged")
    runs = [_sibling(where, row) for where, row in kept if row.get("curve")]
    return Ladder(
        rows=tuple(rows),
        hashes=tuple(map(record_sha256, rows)),
        points=_points(rows),
        siblings=tuple(runs),
        common={key: one[key] for key in COMMON},
        diverged=len(found) - len(rows),
    )


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the records of a ladder")
    rows = []
    with reading(path):
        text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}: line {number}"
        if line.strip():
            try:
                row = loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}); mend it") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object; one run a line")
            rows.append((where, row))
    return rows


def _check(where: str, row: Mapping[str, Any]) -> None:
    if row.get("kind", "rung") != "rung":
        raise UserError(f"{where}: kind={row['kind']!r} is no finished run; give records of rungs")
    missing = [key for key in NEEDED if key not in row]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}: it cannot be compared with others")
    for key in ("params_active", "tokens", *SHAPE):
        value = row.get(key)
        if key in NEEDED or value is not None:
            _positive(where, key, value)
    if row["loss"] is not None:
        _positive(where, "loss", row["loss"])
    try:
        when(row["finished"])
    except UserError as error:
        raise UserError(f"{where}: finished: {error}") from None


def _positive(where: str, key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {key}={value!r} is no number above 0; mend the record")


def _points(rows: Sequence[Mapping[str, Any]]) -> Points:
    def column(key: str) -> list[float]:
        return [float("nan") if row.get(key) is None else float(row[key]) for row in rows]

    bytes_per_token = [_bytes_per_token(row) for row in rows]
    points = Points.of(
        column("params_active"),
        column("tokens"),
        column("loss"),
        router=[str(row.get("router") or "") for row in rows],
        bytes_per_token=bytes_per_token,
        seed=column("seed"),
        **{key: column(key) for key in SHAPE},
    )
    assert len(points) == len(rows)
    return points


def _bytes_per_token(row: Mapping[str, Any]) -> float:
    """A record has its loss in both units: nats per token and bits per byte."""
    bits = row.get("bits_per_byte")
    return float(row["loss"]) / math.log(2) / float(bits) if bits else float("nan")


def _sibling(where: str, row: Mapping[str, Any]) -> Run:
    """Its curve over the steps of its own schedule."""
    try:
        curve = np.array(row["curve"], np.float64)
        steps, tokens, loss = curve[curve[:, 0] > 0].T
        rising = steps.size and np.all(np.diff(steps) > 0) and np.all(np.diff(tokens) > 0)
        rising = rising and np.all(np.isfinite(tokens)) and np.all(steps == np.round(steps))
    except (TypeError, ValueError, IndexError):
        rising = False
    if not rising:
        raise UserError(f"{where}: curve must be rising [step, tokens, loss] rows; mend the record")
    ends = ((tokens[-1], row["tokens"], "tokens"), (loss[-1], row["loss"], "loss"))
    for have, want, key in ends:
        if not math.isclose(have, want, rel_tol=ENDS_ALIKE):
            raise UserError(
                f"{where}: its curve ends at {key} {have!r} and the run at {want!r}: not the whole "
                "curve of this run; mend the record, or leave the curve out"
            )
    end = int(steps[-1])
    at = np.interp(np.arange(1, end + 1), np.append(0.0, steps), np.append(0.0, tokens))
    return Run(
        schedule=Schedule(lr=np.ones(end), tokens=at),
        steps=steps.astype(np.int64),
        loss=loss,
        params_active=float(row["params_active"]),
        params_total=row.get("params_total"),
        name=f"{row.get('family', 'rung')} {row.get('rung', '')} seed {row.get('seed', 0)}",
    )
