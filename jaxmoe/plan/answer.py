"""All that is said of one config on one cluster."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, fingerprint
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.model.cost import Cost, cost
from jaxmoe.plan.forecast import Run, StepTime, step_time, whole_run
from jaxmoe.plan.hardware import Hardware
from jaxmoe.plan.memory import Memory, forecast, microbatches
from jaxmoe.plan.traffic import Flow
from jaxmoe.run.state import param_specs

# Of a chip's memory: how far the forecast was too low where it was measured (docs/plan.md).
SAFE = {"cpu": 0.9, "gpu": 0.9, "tpu": 0.67}


@dataclass(frozen=True, kw_only=True)
class Answer:
    config: Config
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
            "microbatches": microbatches(self.config, self.devices),
            "remat": self.config.model.remat,
            "efficiency": self.efficiency,
            "model": plain(self.counted),
            "memory": {**memory, "peak": self.memory.peak, "available": self.available},
            "fits": self.fits,
            "verdict": self.verdict,
            "traffic": [{**plain(f), "seconds": f.seconds} for f in self.flows],
            "step": {**plain(self.step), "seconds": self.step.seconds, "bound": self.step.bound},
            "run": plain(self.run),
            "run_at_given_mfu": None if self.asked is None else plain(self.asked),
        }


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
    feasible(config, n_devices)
    efficiency = chip.efficiency if efficiency is None else efficiency
    memory = forecast(config, n_devices, chip.backend)
    step, flows = step_time(config, n_devices, chip, memory, efficiency)

    def run(mfu: float | None) -> Run:
        return whole_run(config, n_devices, chip, step, tokens=tokens, mfu=mfu, price=price)

    return Answer(
        config=config,
        chip=chip,
        devices=n_devices,
        sizes=mesh_lib.sizes(config.mesh, n_devices),
        efficiency=efficiency,
        counted=cost(config.model, config.train.seq_len),
        memory=memory,
        flows=tuple(flows),
        step=step,
        run=run(None),
        asked=None if mfu is None else run(mfu),
    )


def feasible(config: Config, n_devices: int) -> None:
    """Says why a config cannot run there, before anything is traced.

    Raises:
        UserError: a rule between fields, or a mesh that does not divide devices, dims or batch.
    """
    check(config)
    mesh = mesh_lib.abstract(config.mesh, n_devices)
    mesh_lib.shardings(param_specs(config), mesh)
    train = config.train
    mesh_lib.check_batch(mesh, "train.batch_size", train.batch_size, train.accumulate)


def check_devices(n_devices: int) -> None:
    if n_devices < 1:
        raise UserError(f"--devices {n_devices}: give at least one")


def versions() -> dict[str, str]:
    """What a trace depends on."""
    return {"jax": jax.__version__}
