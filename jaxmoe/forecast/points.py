"""Finished runs as points: parameters, tokens, compute and final held-out loss.

Units: parameters and tokens are counts, compute is FLOPs, losses are nats per token. All are
float64: 6 * N * D of a large run overflows int64.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats
from jaxmoe.outside import loads, reading

__all__ = ["MIN_BUDGETS", "MIN_DECADES", "Points", "read_points", "refuse_thin"]

MIN_BUDGETS = 4  # three constants of L(C) and one to contradict them
MIN_DECADES = 0.5
SAME_BUDGET = 0.02  # runs within 2 % of compute are one budget: reruns, other seeds
REPEAT_TOKENS = 15.39  # R*_D of Muennighoff et al. 2023 (arXiv:2305.16264), section 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Runs [n] of one recipe. A row with a value missing or not finite is dropped and counted.

    Attributes:
        params_active, tokens: [n], above 0.
        loss: [n], above 0; NaN in a target that has not been trained.
        flops: [n]; where NaN, 6 * params_active * tokens.
        params_total: [n]; where NaN, params_active.
        unique_tokens: [n]; where NaN, tokens: every token seen once.
        experts, top_k: [n]; where NaN, 1.
        bytes_per_token, seed: [n]; NaN where unknown.
        router: [n] names, "" where unknown.
        dropped: rows left out.

    Raises:
        UserError: lengths differ, or a count is not above 0.
    """

    params_active: Floats
    tokens: Floats
    loss: Floats
    flops: Floats
    params_total: Floats
    unique_tokens: Floats
    experts: Floats
    top_k: Floats
    bytes_per_token: Floats
    seed: Floats
    router: np.ndarray
    dropped: int = 0

    @classmethod
    def of(
        cls,
        params_active: ArrayLike,
        tokens: ArrayLike,
        loss: ArrayLike | None = None,
        *,
        flops: ArrayLike | None = None,
        params_total: ArrayLike | None = None,
        unique_tokens: ArrayLike | None = None,
        experts: ArrayLike | None = None,
        top_k: ArrayLike | None = None,
        bytes_per_token: ArrayLike | None = None,
        seed: ArrayLike | None = None,
        router: Sequence[str] | None = None,
    ) -> "Points":
        """Points from plain numbers. Without `loss` they are a target, and none is dropped."""
        n = _column(params_active)
        size = n.size

        def given(values: ArrayLike | None, default: Floats, name: str) -> Floats:
            got = np.full(size, np.nan) if values is None else _column(values)
            if got.shape != (size,):
                raise UserError(f"{name}: {got.size} values for {size} runs; give one a run")
            return np.where(np.isnan(got), default, got)

        d = given(tokens, np.full(size, np.nan), "tokens")
        y = given(loss, np.full(size, np.nan), "loss")
        limits = (("params_active", n, 1e60), ("tokens", d, 1e60), ("loss", y, 1e6))
        for name, values, most in limits:
            _refuse_slips(name, values, most)
        names = np.array([""] * size if router is None else list(router), dtype=str)
        if names.shape != (size,):
            raise UserError(f"router: {names.size} values for {size} runs; give one a run")
        points = cls(
            params_active=n,
            tokens=d,
            loss=y,
            flops=given(flops, 6.0 * n * d, "flops"),
            params_total=given(params_total, n, "params_total"),
            unique_tokens=given(unique_tokens, d, "unique_tokens"),
            experts=given(experts, np.ones(size), "experts"),
            top_k=given(top_k, np.ones(size), "top_k"),
            bytes_per_token=given(bytes_per_token, np.full(size, np.nan), "bytes_per_token"),
            seed=given(seed, np.full(size, np.nan), "seed"),
            router=names,
        )
        _refuse_slips("flops", points.flops, 1e120)
        keep = np.ones(size, bool)
        for name in ("params_active", "tokens", "flops", "params_total", "unique_tokens", "loss"):
            values = getattr(points, name)
            low = np.flatnonzero(values <= 0)
            if low.size:
                raise UserError(
                    f"{name}={values[low[0]]:g} of run {low[0] + 1}: it must be above 0"
                )
            if name != "loss" or loss is not None:
                keep &= np.isfinite(values)
        return points.take(keep, dropped=int(np.sum(~keep)))

    def __len__(self) -> int:
        return int(self.params_active.size)

    def take(self, which: ArrayLike, *, dropped: int | None = None) -> "Points":
        """The runs that a mask or indices choose."""
        at = np.asarray(which)
        arrays = {f.name: getattr(self, f.name)[at] for f in fields(self) if f.name != "dropped"}
        return replace(self, **arrays, dropped=self.dropped if dropped is None else dropped)

    @property
    def knows_bytes(self) -> bool:
        """Whether any run tells the bytes of its tokens."""
        return bool(np.any(np.isfinite(self.bytes_per_token)))

    @property
    def effective_tokens(self) -> Floats:
        """[n] D' of Muennighoff et al. 2023, eq. 5: U + U R* (1 - exp(-R / R*)), R = D / U - 1.

        A token seen for the (1 + R)-th time is worth exp(-R / R*) of a new one; R* is 15.39.
        """
        unique = np.minimum(self.unique_tokens, self.tokens)
        repeats = self.tokens / unique - 1.0
        return unique * (1.0 + REPEAT_TOKENS * -np.expm1(-repeats / REPEAT_TOKENS))

    @property
    def budgets(self) -> Floats:
        """Distinct budgets of compute, rising; those within 2 % of the one before are one."""
        kept: list[float] = []
        for value in np.sort(self.flops):
            if not kept or value > kept[-1] * (1 + SAME_BUDGET):
                kept.append(float(value))
        return np.array(kept)


def _refuse_slips(name: str, values: Floats, most: float) -> None:
    """Slips of the pen, whose powers and quotients would be no numbers."""
    wrong = np.flatnonzero((values > most) & (values < np.inf) | (values > 0) & (values < 1 / most))
    if wrong.size:
        found = f"{name}={values[wrong[0]]:g} of run {wrong[0] + 1}"
        raise UserError(f"{found}: no run has more than {most:g} or so little; mend the record")


def refuse_thin(points: Points) -> None:
    """Raises UserError, with the reason, where runs are too few or too alike to extrapolate."""
    budgets = points.budgets
    if budgets.size < MIN_BUDGETS:
        raise UserError(
            f"{budgets.size} distinct compute budgets cannot carry a forecast: a power law with a "
            f"floor has three constants; train at {MIN_BUDGETS} or more"
        )
    decades = float(np.log10(budgets[-1] / budgets[0]))
    if decades < MIN_DECADES:
        raise UserError(
            f"the runs span {decades:.2f} decades of compute; "
            f"a slope needs {MIN_DECADES}: train smaller ones too"
        )


def read_points(paths: Sequence[str | Path]) -> Points:
    """Points of CSV (with a header) or JSON-lines files, in order.

    Columns: params_active (or params), tokens, loss, and if there are any flops, params_total,
    unique_tokens, experts, top_k, bytes_per_token, router. Others are ignored; an empty or null
    field is missing.

    Raises:
        UserError: no such file, no such column, or a field that is not a number.
    """
    rows: list[Mapping[str, Any]] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file; give CSV or JSON lines of finished runs")
        rows += list(_rows(path))
    if not rows:
        raise UserError("no runs in the records; give one line a finished run")
    columns = {name: [_number(row, name) for row in rows] for name in NUMBERS}
    for name in ("params_active", "tokens", "loss"):
        if np.all(np.isnan(columns[name])):
            raise UserError(f"the records have no {name}; they need params_active, tokens and loss")
    return Points.of(
        columns.pop("params_active"),
        columns.pop("tokens"),
        columns.pop("loss"),
        router=[str(row.get("router") or "") for row in rows],
        **columns,
    )


NUMBERS = (
    "params_active",
    "tokens",
    "loss",
    "flops",
    "params_total",
    "unique_tokens",
    "experts",
    "top_k",
    "bytes_per_token",
)
ALIASES = {"params_active": ("params_active", "params")}


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with reading(path):
        text = path.read_text()
    if not text.lstrip().startswith("{"):
        with reading(path):
            yield from csv.DictReader(text.splitlines())
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); mend it") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object; one object a line")
            yield row


def _number(row: Mapping[str, Any], name: str) -> float:
    for key in ALIASES.get(name, (name,)):
        value = row.get(key)
        if value is not None and value != "":
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{key}={value!r} is not a number; mend the record") from None
    return float("nan")


def _column(values: ArrayLike) -> Floats:
    return np.atleast_1d(np.array(values, dtype=np.float64))
