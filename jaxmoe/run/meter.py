"""Speed and the metrics line of a step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.model.cost import cost
from jaxmoe.model.router import RouterStats
from jaxmoe.optim import rates
from jaxmoe.run.progress import View
from jaxmoe.run.step import StepMetrics

DEAD = 0.01  # of an even share: an expert with less of a step's tokens counts as dead
LOAD_VALUES = 1024  # layers x experts: with more, moe/load would make lines of 100 kB


@dataclass
class CodeLength:
    """Online code of the training text (Dawid, "Present position and potential developments", 1984;
    Blier and Ollivier, arXiv:1802.07044, section 3): what each token costs before it is learnt
    from, summed over the sequences, or for the plain stream the steps, that were not read before.
    """

    bits: dict[str, float] = field(default_factory=dict)  # by source
    tokens: dict[str, int] = field(default_factory=dict)  # targets
    known: bool = True  # a run begun before this was counted has none

    def add(self, source: str, nats: float, tokens: int) -> None:
        self.bits[source] = self.bits.get(source, 0.0) + nats / math.log(2)
        self.tokens[source] = self.tokens.get(source, 0) + tokens

    def line(self) -> dict[str, Any]:
        """Of metrics.jsonl: in all, and of each source where there are several."""
        if not self.known:
            return {}
        found: dict[str, Any] = {}
        for name, values in (("code_bits", self.bits), ("code_tokens", self.tokens)):
            found[f"data/{name}"] = sum(values.values())
            if len(values) > 1:
                found |= {f"data/{name}/{source}": value for source, value in values.items()}
        return found


class Meter:
    """Times steps apart from compiling, the first step, evals and checkpoints."""

    def __init__(self, config: Config, *, peak: float) -> None:
        self.compile_seconds: float | None = None
        self.first_step_seconds: float | None = None
        self._config, self._peak, self._plan = config, peak, curriculum(config)
        self._flops_per_token = {
            shape.length: cost(config.model, shape.length).flops_per_token
            for shape in self._plan.shapes
        }
        self._rates = rates(config) * config.optim.lr
        self._before = 0.0  # seconds of earlier starts of this run
        self._began = self._mark = time.perf_counter()
        self._speed: dict[str, float | None] | None = None
        self._forget()

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its starts."""
        return self._before + time.perf_counter() - self._began

    def restore(self, seconds: float) -> None:
        self._before = seconds

    def compiled(self, seconds: float) -> None:
        """A shape of the step; the first one's seconds are kept."""
        if self.compile_seconds is None:
            self.compile_seconds = seconds
        self._mark = time.perf_counter()

    def stepped(self, step: int) -> None:
        """Step `step`, from 1, has ended; the first one timed is kept out of the speed."""
        now = time.perf_counter()
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._mark
        else:
            self._busy += now - self._mark
            self._count += 1
            shape = self._plan.at(step - 1).shape
            self._tokens += shape.tokens
            self._flops += float(shape.tokens) * self._flops_per_token[shape.length]
        self._mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not a step's; nor is what lies before the end of the first step."""
        if self.first_step_seconds is not None:
            self._busy += time.perf_counter() - self._mark
        yield
        self._mark = time.perf_counter()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Time in here the loop spends on the next batch, while the device has the last step."""
        begin = time.perf_counter()
        yield
        if self.first_step_seconds is not None:
            self._drawn += time.perf_counter() - begin

    def flops(self, step: int) -> float:
        """Of the model, of the first `step` steps."""
        total = 0.0
        for stretch in self._plan.stretches:
            steps = min(max(0, step - stretch.step), stretch.steps)
            tokens = float(steps * stretch.shape.tokens)
            total += tokens * self._flops_per_token[stretch.shape.length]
        return total

    def _forget(self) -> None:
        """A new window: seconds of steps, and of them for drawing; what the steps were."""
        self._busy = self._drawn = self._flops = 0.0
        self._count = self._tokens = 0

    def line(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        """The object of metrics.jsonl. Losses are of this very step; speed since the last line."""
        m = jax.device_get(metrics)
        return {
            "step": step,
            "tokens": self._plan.tokens(step),
            "flops": self.flops(step),
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
        steps = self._config.train.steps
        rate = line["perf/mfu"] and line["perf/mfu"] * self._peak  # FLOP/s
        return View(
            step=step,
            steps=steps,
            tokens_per_second=line["perf/tokens_per_second"],
            mfu=line["perf/mfu"],
            train_nll=line["train/nll"],
            load=(line["moe/load_min"], line["moe/load_max"]) if "moe/load_min" in line else None,
            dead=line.get("moe/dead_experts", 0),
            seconds_left=(self.flops(steps) - line["flops"]) / rate if rate else None,
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
            self._speed = {
                "perf/step_seconds": self._busy / self._count,
                "perf/tokens_per_second": self._tokens / self._busy,
                "perf/mfu": self._flops / self._busy / self._peak,
                "perf/data_wait": self._drawn / self._busy,
            }
            self._forget()
        names = ("step_seconds", "tokens_per_second", "mfu", "data_wait")
        return self._speed or dict.fromkeys(f"perf/{name}" for name in names)


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
