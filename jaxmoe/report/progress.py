"""How far a run is at a step: tokens, FLOPs, hours, share; what several runs are laid over."""

import math
from collections.abc import Sequence

import numpy as np

from jaxmoe.report.plot import round_
from jaxmoe.report.records import Row, Run, number

__all__ = ["AXES", "Progress"]

AXES = {
    "tokens": "tokens",
    "compute": "training compute, FLOPs",
    "step": "step",
    "share": "share of the run, %",
    "hours": "hours of training, over all starts",
}


class Progress:
    """Of one run, from its metrics and evals."""

    def __init__(self, run: Run) -> None:
        self._run = run
        ends = [
            {"step": row.get("target_step"), "tokens": row.get("target_tokens")}
            for row in run.register
        ]
        tokens = _curve([*run.metrics, *run.heldout, *ends], "tokens")
        flops = _curve(run.metrics, "flops")
        each = number(run.environment, "flops_per_token")
        if len(flops) < 2 and each is not None:  # of one length; a record may hold nothing better
            flops = [(step, each * value) for step, value in tokens]
        self._curves = {
            "tokens": tokens,
            "compute": flops,
            "hours": [(step, value / 3600) for step, value in _curve(run.metrics, "seconds")],
            "step": [(0.0, 0.0), (1.0, 1.0)],
            "share": [(0.0, 0.0), (float(run.target_step or run.step), 100.0)],
        }

    def known(self, kind: str) -> bool:
        return len(self._curves[kind]) > 1

    def at(self, kind: str, steps: Sequence[float]) -> list[float | None]:
        """Of each step; beyond the last known one at the pace of all before. None: not known."""
        curve = self._curves[kind]
        if len(curve) < 2:
            return [None] * len(steps)
        x, y = np.array(curve, np.float64).T
        pace = (y[-1] - y[0]) / (x[-1] - x[0])
        found = np.interp(steps, x, y) + pace * np.maximum(0, np.array(steps) - x[-1])
        return [round_(float(value)) for value in found]


def _curve(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) from (0, 0), rising in step."""
    known = {0.0: 0.0}
    for row in rows:
        step, value = number(row, "step"), number(row, key)
        if step is not None and value is not None and math.isfinite(step):
            known[float(step)] = float(value)
    return sorted(known.items())
