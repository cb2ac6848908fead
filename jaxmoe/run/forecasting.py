"""The hook that forecasts the final held-out loss while the run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.forecast import register
from jaxmoe.forecast.curve import Run, Schedule
from jaxmoe.forecast.hook_api import Forecast, forecast_final, ready
from jaxmoe.optim import rates
from jaxmoe.run.evaluation import EvalSet
from jaxmoe.run.record import EVALS, FORECASTS


class ForecastHook:
    """Collects the held-out losses, and every `forecast.every` steps registers a forecast.

    The losses it has seen are its state, saved with the checkpoint. The register is never rewound:
    after a resume, forecasts that are in it already are not made again.
    """

    def __init__(
        self, config: Config, run_dir: Path, held_out: EvalSet, event: Callable[[int, str], None]
    ) -> None:
        self.latest: Forecast | None = None
        self._config = config
        self._held_out = held_out
        self._file = run_dir / FORECASTS
        self._evals = run_dir / EVALS
        self._seen: list[tuple[int, float]] = []
        self._schedule = Schedule(lr=rates(config), tokens=curriculum(config).by_step())
        if register.repair_torn(self._file):
            event(0, "a kill had torn the register's last line; it was removed")
        lines = register.read(self._file) if self._file.exists() else []
        self._registered = {line["cutoff_step"] for line in lines if line["kind"] == "forecast"}
        self._closed = any(line["kind"] == "outcome" for line in lines)
        # Of the first forecast: a later one would absorb what goes wrong.
        self.frozen = next((line["path"] for line in lines if line["kind"] == "forecast"), None)

    def state(self) -> list[list[float]]:
        return [[step, loss] for step, loss in self._seen]

    def restore(self, state: list[list[float]]) -> None:
        self._seen = [(int(step), float(loss)) for step, loss in state]

    def after_eval(self, step: int, nll: float) -> None:
        self._seen.append((step, nll))
        if step == self._config.train.steps:
            self._close(step, nll)
        elif self._due(step):
            self._forecast(step)

    def _due(self, step: int) -> bool:
        first, every = self._config.forecast.first, self._config.forecast.every
        return step >= first and (step - first) % every == 0

    def _forecast(self, step: int) -> None:
        run = self._run()
        if not ready(run):
            return
        # The same seed for the same cut-off: a resumed run makes the same forecast.
        self.latest = forecast_final(run, seed=self._config.seed + step)
        if step not in self._registered:
            lines = self._evals.read_text().count("\n")
            record = self.latest.record(**self._where(), evals_lines=lines)
            register.append(self._file, record)
            self._registered.add(step)
            self.frozen = self.frozen or record["path"]

    def _close(self, step: int, nll: float) -> None:
        if self._registered and not self._closed:
            tokens = curriculum(self._config).tokens(step)
            outcome = {"target_step": step, "target_tokens": tokens, "loss": {"realised": nll}}
            register.append(self._file, {"kind": "outcome", **outcome, **self._where()})
            self._closed = True

    def _run(self) -> Run:
        # Step 0 is before any update: no law of training speaks of it.
        seen = [pair for pair in self._seen if pair[0] > 0]
        return Run(
            schedule=self._schedule,
            steps=np.array([step for step, _ in seen], np.int64),
            loss=np.array([loss for _, loss in seen], np.float64),
        )

    def _where(self) -> dict[str, Any]:
        return {
            "config": config_lib.fingerprint(self._config),
            "set": self._held_out.held_out.name,
            "set_fingerprint": self._held_out.held_out.fingerprint,
            "train_fingerprint": self._held_out.train_fingerprint,
            "leaking": self._held_out.leaking,
        }
