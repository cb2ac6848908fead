"""Speed and the metrics line of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxmoe.config import Config
from jaxmoe.model.cost import cost
from jaxmoe.optim import relative_path
from jaxmoe.run.progress import View
from jaxmoe.run.step import StepMetrics


class Meter:
    """Times steps apart from compiling, the first step, evals and checkpoints."""

    def __init__(self, config: Config, *, peak: float) -> None:
        self.compile_seconds: float | None = None
        self.first_step_seconds: float | None = None
        self._config, self._peak = config, peak
        self._flops_per_token = cost(config.model, config.train.seq_len).flops_per_token
        self._rates = relative_path(config.optim, config.train.steps) * config.optim.lr
        self._before = 0.0  # seconds of earlier starts of this run
        self._began = self._mark = time.perf_counter()
        self._busy, self._count, self._speed = 0.0, 0, None

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its starts."""
        return self._before + time.perf_counter() - self._began

    def restore(self, seconds: float) -> None:
        self._before = seconds

    def compiled(self, seconds: float) -> None:
        self.compile_seconds = seconds
        self._mark = time.perf_counter()

    def stepped(self) -> None:
        """A step has ended; the first one is kept out of the speed."""
        now = time.perf_counter()
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._mark
        else:
            self._busy += now - self._mark
            self._count += 1
        self._mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not a step's; nor is what lies before the end of the first step."""
        if self.first_step_seconds is not None:
            self._busy += time.perf_counter() - self._mark
        yield
        self._mark = time.perf_counter()

    def line(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        """The object of metrics.jsonl. Losses are of this very step; speed since the last line."""
        m = jax.device_get(metrics)
        load = np.asarray(m.router.load_E, np.float64)  # [R, E]
        tokens = step * self._config.tokens_per_step
        return {
            "step": step,
            "tokens": tokens,
            "flops": float(tokens) * self._flops_per_token,
            "seconds": round(self.seconds, 3),
            "train/nll": float(m.sums.nll / m.sums.weight),
            "train/loss": float(m.sums.total / m.sums.weight),
            "train/grad_norm": float(m.grad_norm),
            "train/lr": float(self._rates[step - 1]),
            "moe/load": np.round(load, 4).tolist(),
            "moe/load_max": float(load.max()),
            "moe/load_min": float(load.min()),
            "moe/load_balance": float(m.router.load_balance.mean()),
            "moe/router_z": float(m.router.router_z.mean()),
            "moe/drop_rate": 0.0,  # dropless by construction (model/moe.py)
            **self._window(),
        }

    def view(self, step: int, line: dict[str, Any], known: dict[str, Any]) -> View:
        steps, seconds = self._config.train.steps, line["perf/step_seconds"]
        return View(
            step=step,
            steps=steps,
            tokens_per_second=line["perf/tokens_per_second"],
            mfu=line["perf/mfu"],
            train_nll=line["train/nll"],
            load=(line["moe/load_min"], line["moe/load_max"]),
            seconds_left=None if seconds is None else seconds * (steps - step),
            **known,
        )

    def _window(self) -> dict[str, float | None]:
        """Speed since the last call; that of before if no step ended since."""
        if self._count:
            per_step = self._busy / self._count
            speed = self._config.tokens_per_step / per_step
            self._speed = {
                "perf/step_seconds": per_step,
                "perf/tokens_per_second": speed,
                "perf/mfu": speed * self._flops_per_token / self._peak,
            }
            self._busy, self._count = 0.0, 0
        names = ("perf/step_seconds", "perf/tokens_per_second", "perf/mfu")
        return self._speed or dict.fromkeys(names)
