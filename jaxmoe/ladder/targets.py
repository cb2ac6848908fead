"""Runs that were forecast from a ladder: what was registered before the start, and what came."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.hook_api import Quantiles
from jaxmoe.forecast.ladder import Ladder
from jaxmoe.outside import reading

__all__ = ["Forecasted", "read_targets"]


@dataclass(frozen=True, kw_only=True)
class Forecasted:
    """A target.

    Attributes:
        flops: of the whole run; ratio: over those of the ladder's largest.
        loss: as registered before the start, the newest line of it; nats per token.
        realised: None until the run has ended.
        from_here: whether its forecast rests on just these records.
        problems: that `forecast verify` finds in its register.
    """

    name: str
    law: str
    flops: float
    ratio: float
    loss: Quantiles
    realised: float | None
    from_here: bool
    problems: int

    @property
    def error(self) -> float | None:
        """(median - realised) / realised."""
        return None if self.realised is None else self.loss.median / self.realised - 1

    @property
    def half_width(self) -> float:
        """Of the 90 % interval, over the median."""
        return (self.loss.q95 - self.loss.q05) / 2 / self.loss.median

    @property
    def inside(self) -> bool | None:
        return None if self.realised is None else self.loss.q05 <= self.realised <= self.loss.q95


def read_targets(runs: Sequence[Path], ladder: Ladder) -> list[Forecasted]:
    """Those of run directories.

    Raises:
        UserError: one has no forecast from before its start.
    """
    return [_read(run, ladder) for run in runs]


def _read(run: Path, ladder: Ladder) -> Forecasted:
    file = run / register.FORECASTS
    lines = register.read(file) if file.exists() else []
    before = [x for x in lines if x.get("kind") == "forecast" and x.get("cutoff_step") == 0]
    if not before:
        raise UserError(
            f"--run {run}: no forecast from before its start in {register.FORECASTS}; register it"
            " with python -m jaxmoe.ladder register"
        )
    with reading(file):
        return _forecasted(run.name, before[-1], lines, ladder, len(register.verify(file)))


def _forecasted(
    name: str, line: dict[str, Any], lines: list[dict[str, Any]], ladder: Ladder, problems: int
) -> Forecasted:
    ended = [x for x in lines if x.get("kind") == "outcome"]
    return Forecasted(
        name=name,
        law=line["law"],
        flops=float(line["target"]["flops"]),
        ratio=float(line["extrapolation"]),
        loss=Quantiles(**line["loss"]),
        realised=float(ended[-1]["loss"]["realised"]) if ended else None,
        from_here={one["sha256"] for one in line["siblings"]} == set(ladder.hashes),
        problems=problems,
    )
