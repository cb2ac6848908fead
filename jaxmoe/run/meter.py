"""Speed and the metrics line of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxmoe.config import Config
from jaxmoe.model.cost import cost
from jaxmoe.model.router import RouterStats
from jaxmoe.optim import relative_path
from jaxmoe.run.progress import View
from jaxmoe.run.step import StepMetrics

DEAD = 0.01  # of an even share: an expert with less of a step's tokens counts as dead
LOAD_VALUES = 1024  # layers x experts: with more, moe/load would make lines of 100 kB


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
            **({"train/mtp_nll": m.mtp_nll.tolist()} if m.mtp_nll.size else {}),
            **({} if m.router is None else self._experts(m.router)),
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
            load=(line["moe/load_min"], line["moe/load_max"]) if "moe/load_min" in line else None,
            dead=line.get("moe/dead_experts", 0),
            seconds_left=None if seconds is None else seconds * (steps - step),
            **known,
        )

    def _experts(self, router: RouterStats) -> dict[str, Any]:
        """Of all layers with experts, and one value of each (README, "The run directory")."""
        load_XE = np.asarray(router.load_E, np.float64)
        layers = {
            "load_min": load_XE.min(1),
            "load_max": load_XE.max(1),
            "load_entropy": _evenness(load_XE),
            "dead": (load_XE < DEAD).sum(1),
            # Nothing is counted here: model/moe.py gives each row to each of its experts, whatever
            # their loads. A dispatch with a capacity would have to count what it leaves out.
            "drop_rate": np.zeros(len(load_XE)),
            "overflow": router.overflow,
            "load_balance": router.load_balance,
            "router_z": router.router_z,
        }
        if self._config.model.router.balance_bias_rate is not None:
            layers |= {"bias_low": router.bias_low, "bias_high": router.bias_high}
        whole = {"moe/load": np.round(load_XE, 4).tolist()} if load_XE.size <= LOAD_VALUES else {}
        return {
            **whole,
            "moe/load_max": float(load_XE.max()),
            "moe/load_min": float(load_XE.min()),
            "moe/load_entropy_min": float(layers["load_entropy"].min()),
            "moe/dead_experts": int(layers["dead"].sum()),
            "moe/load_balance": float(router.load_balance.mean()),
            "moe/router_z": float(router.router_z.mean()),
            "moe/drop_rate": float(layers["drop_rate"].mean()),
            "moe/overflow_rate": float(router.overflow.mean()),
            **{f"moe/layer/{key}": _short(values) for key, values in layers.items()},
        }

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


def _evenness(load_XE: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares over log E, by layer: 1 is even, 0 a single expert."""
    n_experts = load_XE.shape[1]
    share_XE = load_XE / n_experts
    log_XE = np.log(share_XE, out=np.zeros_like(share_XE), where=share_XE > 0)
    return 0.0 - (share_XE * log_XE).sum(1) / np.log(n_experts)


def _short(values: Any) -> list[float]:
    """Six digits each: there are some ten values a layer in every line. Counts stay whole."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.6g}") for value in values.tolist()]
