"""All that is said of one config on one cluster."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, fingerprint
from jaxmoe.config_check import check
from jaxmoe.curriculum import Shape
from jaxmoe.errors import UserError
from jaxmoe.model.cost import Cost, cost
from jaxmoe.plan.forecast import Run, StepTime, step_time, together, whole_run
from jaxmoe.plan.hardware import Hardware
from jaxmoe.plan.memory import Memory, forecast, microbatches
from jaxmoe.plan.stages import Stage, pinned, ramped, stages
from jaxmoe.plan.traffic import Flow
from jaxmoe.run.state import param_specs

# Of a chip's memory: how far the forecast was too low where it was measured (docs/plan.md).
SAFE = {"cpu": 0.9, "gpu": 0.9, "tpu": 0.67}
ASKED = "run_at_given_mfu"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of a run whose batch or length grows: the shape that needs the most memory, since it says
    whether the run fits; `run` and `asked` are sums over `stages`, each with its own answer."""

    config: Config
    shape: Shape
    chip: Hardware
    devices: int
    sizes: dict[str, int]
    efficiency: float
    counted: Cost
    memory: Memory
    flows: tuple[Flow, ...]
    step: StepTime
    run: Run  # by the roofline
    asked: Run | None  # by --mfu
    stages: tuple[tuple[Stage, "Answer"], ...] = ()  # under a ramp

    @property
    def microbatches(self) -> int:
        return microbatches(pinned(self.config, self.shape), self.devices)

    @property
    def available(self) -> float:
        """Bytes a device has; emulated ones share a machine's."""
        return self.chip.hbm / (self.devices if self.chip.backend == "cpu" else 1)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    @property
    def verdict(self) -> str:
        used = self.memory.peak / self.available
        if used > 1:
            return f"does not fit: {used:.0%} of a device's memory"
        safe = SAFE[self.chip.backend]
        if used > safe:
            low = 1 - safe
            return f"may not fit: {used:.0%} of a device's memory; forecasts were {low:.0%} too low"
        return f"fits: {used:.0%} of a device's memory"

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        plain = dataclasses.asdict
        memory = plain(self.memory)
        return {
            "config": self.config.name,
            "fingerprint": fingerprint(self.config),
            "hardware": plain(self.chip),
            "devices": self.devices,
            "mesh": self.sizes,
            "rounds": self.config.mesh.rounds,
            "microbatches": self.microbatches,
            "remat": self.config.model.remat,
            "efficiency": self.efficiency,
            "model": plain(self.counted),
            "memory": {**memory, "peak": self.memory.peak, "available": self.available},
            "fits": self.fits,
            "verdict": self.verdict,
            "traffic": [{**plain(f), "seconds": f.seconds} for f in self.flows],
            "step": {**plain(self.step), "seconds": self.step.seconds, "bound": self.step.bound},
            "run": plain(self.run),
            ASKED: None if self.asked is None else plain(self.asked),
            **self._stages_as_dict(),
        }

    def _stages_as_dict(self) -> dict[str, Any]:
        if not self.stages:
            return {}
        own = (*"microbatches model memory fits verdict traffic step run".split(), ASKED)
        parts = []
        for stage, answer in self.stages:
            found = answer.as_dict()
            about = {
                **dataclasses.asdict(stage.shape),
                "first_step": stage.step,
                "steps": stage.steps,
                "tokens_before": stage.start,
                "tokens": stage.tokens,
            }
            parts.append({**about, **{key: found[key] for key in own}})
        return {"shape": dataclasses.asdict(self.shape), "stages": parts}


def plan(
    config: Config,
    n_devices: int,
    chip: Hardware,
    *,
    efficiency: float | None = None,
    tokens: int | None = None,
    mfu: float | None = None,
    price: float | None = None,
) -> Answer:
    """Raises:
    UserError: a rule between fields, or a mesh that does not divide devices, dims or batch.
    """
    check(config)
    parts = stages(config, tokens)
    feasible(config, n_devices, parts)
    efficiency = chip.efficiency if efficiency is None else efficiency
    shapes = dict.fromkeys(part.shape for part in parts)
    traced = {s: _traced(pinned(config, s), n_devices, chip, efficiency) for s in shapes}

    def answer(part: Stage) -> Answer:
        one, (memory, step, flows) = pinned(config, part.shape), traced[part.shape]
        run = partial(
            whole_run, one, n_devices, chip, step, tokens=part.tokens, price=price, mfu=None
        )
        return Answer(
            config=config,
            shape=part.shape,
            chip=chip,
            devices=n_devices,
            sizes=mesh_lib.sizes(config.mesh, n_devices),
            efficiency=efficiency,
            counted=cost(config.model, part.shape.length),
            memory=memory,
            flows=tuple(flows),
            step=step,
            run=run(),
            asked=None if mfu is None else run(mfu=mfu),
        )

    answers = [answer(part) for part in parts]
    return _whole(parts, answers) if ramped(config) else answers[0]


def _traced(
    config: Config, n_devices: int, chip: Hardware, efficiency: float
) -> tuple[Memory, StepTime, list[Flow]]:
    memory = forecast(config, n_devices, chip.backend)
    return memory, *step_time(config, n_devices, chip, memory, efficiency)


def _whole(parts: Sequence[Stage], answers: Sequence[Answer]) -> Answer:
    """The answer of the stage with the highest peak, and the sums over all of them."""
    asked = [answer.asked for answer in answers if answer.asked is not None]
    return dataclasses.replace(
        max(answers, key=lambda answer: answer.memory.peak),
        run=together([answer.run for answer in answers]),
        asked=together(asked) if asked else None,
        stages=tuple(zip(parts, answers, strict=True)),
    )


def feasible(config: Config, n_devices: int, parts: Sequence[Stage]) -> None:
    """Says why a config cannot run there, in any stage, before anything is traced.

    Raises:
        UserError: a rule between fields, or a mesh that does not divide devices, dims or batch.
    """
    mesh = mesh_lib.abstract(config.mesh, n_devices)
    mesh_lib.shardings(param_specs(config), mesh)
    for shape in dict.fromkeys(part.shape for part in parts):
        check(pinned(config, shape))
        mesh_lib.check_batch(mesh, "train.batch_size", shape.batch, shape.accumulate)


def check_devices(n_devices: int) -> None:
    if n_devices < 1:
        raise UserError(f"--devices {n_devices}: give at least one")


def versions() -> dict[str, str]:
    """What a trace depends on."""
    return {"jax": jax.__version__}
