"""The hook that forecasts the final held-out loss while the run goes on.

A forecast is made by one worker thread beside the steps that follow its eval. What it says is taken
over at fixed points (the next eval, the end), never when it happens to be ready: a slow machine
shows and records the same as a fast one. It is in the register before the next eval is measured.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.curve import Run
from jaxmoe.forecast.hook_api import PathPoint, forecast_final, ready
from jaxmoe.outside import needed, reading
from jaxmoe.run.evaluation import EvalSet
from jaxmoe.run.record import EVALS, FORECASTS, read_lines, run_fingerprint
from jaxmoe.run.target import rates_of, schedule_of

__all__ = ["ForecastHook"]

Line = Mapping[str, Any]  # of the register


class ForecastHook:
    """Collects the held-out losses, and every `forecast.every` steps registers a forecast.

    The losses it has seen are its state, saved with the checkpoint, and so is the newest line's
    hash. The register is never rewound: after a resume, forecasts that are in it are not made
    again, and one that a kill came before is made then.

    Attributes:
        latest: the newest forecast that was taken over.
        frozen: the path that residuals are of: of the forecast registered before the start, or else
            of the run's first one; a later one would absorb what goes wrong.
    """

    def __init__(
        self, config: Config, run_dir: Path, held_out: EvalSet, event: Callable[[int, str], None]
    ) -> None:
        self.latest: Line | None = None
        self._config = config
        self._held_out = held_out
        self._file = run_dir / FORECASTS
        self._evals = run_dir / EVALS
        self._seen: list[tuple[int, float]] = []
        self._schedule = schedule_of(config)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forecast")
        self._pending: Future[Line] | None = None
        if register.repair_torn(self._file):
            event(0, "a kill had torn the register's last line; it was removed")
        lines = register.read(self._file) if self._file.exists() else []
        with reading(self._file):
            _check_lines(lines)
        made = [line for line in lines if line["kind"] == "forecast"]
        _check_planned(self._file, made, self._where())
        # By cut-off: of the loop's own. What others registered at the same step is theirs.
        own = [line for line in made if not line.get("siblings")]
        self._own: dict[int, Line] = {line["cutoff_step"]: line for line in own}
        self.planned = _newest(line for line in made if line["cutoff_step"] == 0)
        self._any, self._closed = bool(made), len(made) < len(lines)
        self.frozen: list[Any] | None = None
        self._take(self.planned)

    def state(self) -> list[list[float]]:
        return [[step, loss] for step, loss in self._seen]

    def head(self) -> dict[str, Any]:
        """Count and hash of the newest line, for the checkpoint."""
        return register.head(self._file)

    def restore(self, state: list[list[float]], head: Any = None) -> None:
        """Losses seen by a checkpoint, and what it held of the register (None: older ones).

        Raises:
            UserError: the register has not got the line that the checkpoint saw.
        """
        if head is not None and (wrong := register.contains(self._file, head)) is not None:
            raise UserError(
                f"{self._file} is not the register of this run's checkpoint: {wrong};"
                " bring it back, or give another --run-dir"
            )
        self._seen = [(int(step), float(loss)) for step, loss in state]
        # All were taken over but that of the last eval, which the next one does.
        *before, last = [step for step, _ in self._seen] or [0]
        for step in filter(self._due, before):
            if step not in self._own:  # a kill came before it was registered
                self._begin(step)
            self.settle()
            self._take(self._own.get(step))
        if self._due(last):
            self._begin(last)

    def after_eval(self, step: int, nll: float) -> None:
        """Begins the forecast that is due; at the end the outcome is registered."""
        self.settle()
        self._seen.append((step, nll))
        if step == self._config.train.steps:
            self._close(step, nll)
        elif self._due(step):
            self._begin(step)

    def standing(self) -> dict[str, float]:
        """The end by the newest forecast taken over, and by the frozen path; nats per token."""
        line: dict[str, float] = {}
        if self.planned is not None:
            line["forecast/registered_final"] = self.planned["loss"]["median"]
        elif self.frozen is not None:
            line["forecast/registered_final"] = self.frozen[-1]["median"]
        if self.latest is not None:
            loss = self.latest["loss"]
            names = {"final": "median", "final_q05": "q05", "final_q95": "q95"}
            line |= {f"forecast/{name}": loss[level] for name, level in names.items()}
        return line

    def settle(self) -> None:
        """Waits for the forecast that is being made, and takes it over. Raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            line = pending.result()
            self._own[line["cutoff_step"]] = line
            self._any = True
            self._take(line)

    def _due(self, step: int) -> bool:
        first, every = self._config.forecast.first, self._config.forecast.every
        return first <= step < self._config.train.steps and (step - first) % every == 0

    def _begin(self, step: int) -> None:
        if step in self._own:
            self._pending = Future()
            self._pending.set_result(self._own[step])
            return
        run = self._run(step)
        if ready(run):
            # Up to the newest line of its inputs: what a rollback adds later is none of them.
            rows = enumerate(read_lines(self._evals), 1)
            count = max((n for n, row in rows if row["step"] <= step), default=0)
            self._pending = self._worker.submit(partial(self._forecast, run, step, count))

    def _forecast(self, run: Run, step: int, evals_lines: int) -> Line:
        # The same seed for the same cut-off: a resumed run makes the same forecast.
        made = forecast_final(run, seed=self._config.seed + step)
        record = made.record(**self._where(), evals_lines=evals_lines)
        record["run"] = run_fingerprint(self._config)
        record["schedule"] = {**record["schedule"], "parameters": rates_of(self._config)}
        return register.append(self._file, record)

    def _take(self, line: Line | None) -> None:
        if line is None:
            return
        self.latest = line
        if self.frozen is None and len(line["path"]) > 1:
            self.frozen = line["path"]

    def _close(self, step: int, nll: float) -> None:
        if self._any and not self._closed:
            tokens = curriculum(self._config).tokens(step)
            outcome = {"target_step": step, "target_tokens": tokens, "loss": {"realised": nll}}
            register.append(self._file, {"kind": "outcome", **outcome, **self._where()})
            self._closed = True

    def _run(self, until: int) -> Run:
        # Step 0 is before any update: no law of training speaks of it.
        seen = [pair for pair in self._seen if 0 < pair[0] <= until]
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


def _newest(lines: Iterable[Line]) -> Line | None:
    return max(lines, key=lambda line: line["index"], default=None)


def _check_lines(lines: Iterable[Line]) -> None:
    """That what is read of them later is there: whoever writes a register can seal it."""
    for line in lines:
        needed(line, {"kind": str, "index": int}, "a line")
        if line["kind"] == "forecast":
            wanted = {"cutoff_step": int, "set_fingerprint": str, "train_fingerprint": str}
            needed(line, wanted, f"line {line['index'] + 1}")
            for row in (line["loss"], *line["path"]):
                needed(row, {name: float for name in register.LEVELS}, f"line {line['index'] + 1}")
            for point in line["path"]:
                PathPoint(**point)


def _check_planned(file: Path, lines: Iterable[Line], where: Mapping[str, Any]) -> None:
    """Raises UserError where what was registered before the start is of other text."""
    for line in lines:
        for key in ("set_fingerprint", "train_fingerprint"):
            if line["cutoff_step"] == 0 and line[key] != where[key]:
                raise UserError(
                    f"{file}: line {line['index'] + 1} forecasts {key} {line[key]} and this run"
                    f" has {where[key]}; bring the data back, or give another --run-dir"
                )
