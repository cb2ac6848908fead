"""What the training loop calls: one function from a run so far to a forecast of its end."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Run, observations_sha256
from jaxmoe.forecast.laws import MIN_POINTS, Law, WithinRun, usable
from jaxmoe.forecast.provenance import code_fingerprint
from jaxmoe.forecast.register import METRIC

__all__ = ["Forecast", "PathPoint", "Quantiles", "forecast_final", "ready"]

SAMPLES = 4096
PATH_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of the held-out loss that will be measured, in nats per token."""

    q05: float
    q25: float
    median: float
    q75: float
    q95: float


@dataclass(frozen=True, kw_only=True)
class PathPoint(Quantiles):
    """One step of the fan from the cut-off to the target."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A forecast of the loss at `target_step`, made from what was known at `cutoff_step`."""

    law: str
    seed: int
    cutoff_step: int
    cutoff_tokens: float
    target_step: int
    target_tokens: float
    loss: Quantiles
    path: tuple[PathPoint, ...]
    observations: int
    dropped: int
    observations_sha256: str
    schedule: Mapping[str, Any]

    def json(self) -> str:
        """One line of JSON with every field."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def record(
        self,
        *,
        config: str,
        set: str,
        set_fingerprint: str,
        train_fingerprint: str,
        leaking: int,
        evals_lines: int | None = None,
    ) -> dict[str, Any]:
        """The record for `register.append`.

        Args:
            config: the config's fingerprint.
            set, set_fingerprint: the held-out set the losses are of.
            train_fingerprint: the training text that the set was compared with.
            leaking: documents of it that were found to repeat the set, and were left in.
            evals_lines: lines that evals.jsonl had; lets `verify` look past a later rollback.
        """
        tree = dataclasses.asdict(self)
        lines = {} if evals_lines is None else {"evals_lines": evals_lines}
        where = {
            "config": config,
            "set": set,
            "set_fingerprint": set_fingerprint,
            "train_fingerprint": train_fingerprint,
            "leaking": leaking,
        }
        made = {
            "step": self.cutoff_step,
            "tokens": self.cutoff_tokens,
            "horizon_steps": self.target_step - self.cutoff_step,
            "metric": METRIC,
            "code": code_fingerprint(),
            "siblings": [],
            "laws": {self.law: 1.0},
        }
        return {"kind": "forecast", **where, **made, **tree, **lines, "path": list(tree["path"])}


def ready(run: Run) -> bool:
    """Whether there are enough observations for `forecast_final`."""
    return usable(run)[0].size >= MIN_POINTS


def forecast_final(
    run: Run, target_step: int | None = None, seed: int = 0, *, law: Law | None = None
) -> Forecast:
    """Forecasts the held-out loss at a step of the run's schedule; deterministic for a seed.

    Everything in `run` is used: cut it with `run.until(step)` first to forecast from the past.

    Args:
        target_step: None is the end of the schedule.
        law: None is the law of one run, `WithinRun`.

    Raises:
        UserError: under MIN_POINTS observations after the warm-up (ask `ready` first), or a target
            that is not after the last observation or is outside the schedule.
    """
    law = law or WithinRun()
    target = run.schedule.steps if target_step is None else target_step
    fit = law.fit([run], seed=seed)
    cutoff = int(run.steps[-1])
    if target <= cutoff:
        raise UserError(
            f"target step {target} is not after the last eval, step {cutoff}; cut the run"
        )
    count = min(PATH_POINTS, target - cutoff)
    steps = np.unique(np.round(np.linspace(cutoff, target, count + 1)).astype(np.int64))[1:]
    # Another stream than the fit's: equal seeds must not tie the draws to the particles.
    rng = np.random.default_rng([seed, 1])
    drawn = fit.sample(run, steps, n=SAMPLES, rng=rng)
    table = np.quantile(drawn, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0).T
    tokens = run.schedule.tokens
    return Forecast(
        law=fit.law,
        seed=seed,
        cutoff_step=cutoff,
        cutoff_tokens=float(tokens[cutoff - 1]),
        target_step=int(target),
        target_tokens=float(tokens[target - 1]),
        loss=Quantiles(**named(table[-1])),
        path=tuple(
            PathPoint(step=int(step), **named(row)) for step, row in zip(steps, table, strict=True)
        ),
        observations=int(run.steps.size),
        dropped=run.dropped,
        observations_sha256=observations_sha256(run),
        schedule=run.schedule.summary(),
    )


def named(row: Floats) -> dict[str, float]:
    """Fields of Quantiles from the five in order."""
    names = ("q05", "q25", "median", "q75", "q95")
    return {name: float(value) for name, value in zip(names, row, strict=True)}
