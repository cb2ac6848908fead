"""Step time by a roofline, and what a run takes: days, energy, money.

step = (max(compute, memory, hidden traffic) + open traffic) / (1 - bubble) + last traffic + update

compute: FLOPs with recomputation over peak x efficiency. Hidden traffic runs beside compute
(weights, gradients); open traffic is waited for (sums over `model`, rows to experts, the ring); the
last is that of gradients over `replica`, when all stages are done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe import mesh as mesh_lib
from jaxmoe import tree
from jaxmoe.config import Config
from jaxmoe.model.cost import Cost, cost
from jaxmoe.model.lm import lm_specs
from jaxmoe.model.remat import keeps_hidden
from jaxmoe.plan.hardware import Hardware
from jaxmoe.plan.memory import Memory, microbatches
from jaxmoe.plan.traffic import Flow, flows
from jaxmoe.spec import is_spec

DAY, KWH = 86_400.0, 3.6e6


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on each device.

    Attributes:
        compute: matmuls, those computed again included, at the attainable share of the peak.
        memory: weights, activations and buffers through HBM.
        hidden, open, last: traffic that runs beside compute, that does not, and after all of it.
        bubble: share of the step in which a stage of the pipeline has nothing to do.
        update: the optimiser's pass over its state, through HBM.
        recomputed: FLOPs computed twice over model FLOPs.
    """

    compute: float
    memory: float
    hidden: float
    open: float
    last: float
    bubble: float
    update: float
    recomputed: float

    @property
    def seconds(self) -> float:
        busy = max(self.compute, self.memory, self.hidden) + self.open
        return busy / (1 - self.bubble) + self.last + self.update

    @property
    def bound(self) -> str:
        """What the step waits for most."""
        largest = max(self.compute, self.memory, self.hidden)
        if self.open + self.last > largest:
            return "traffic"
        return {self.compute: "compute", self.memory: "memory", self.hidden: "traffic"}[largest]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a whole run takes.

    Attributes:
        mfu: model FLOPs over peak; of the roofline, or as given.
        tokens: of the run.
        flops: of the model, over all tokens; `flops_6nd` is 6 x active x tokens, without attention.
        kwh: at the most that chips and hosts draw; None where nobody says.
    """

    mfu: float
    seconds_a_step: float
    tokens_a_second: float
    tokens: int
    flops: int
    flops_6nd: int
    days: float
    chip_hours: float
    dollars: float
    kwh: float | None


def step_time(
    config: Config, n_devices: int, chip: Hardware, memory: Memory | None, efficiency: float
) -> tuple[StepTime, list[Flow]]:
    """`memory` is needed for what activations move through HBM; None leaves that out."""
    sizes = mesh_lib.sizes(config.mesh, n_devices)
    counted = cost(config.model, config.train.seq_len)
    chips = 1 if chip.backend == "cpu" else n_devices  # emulated devices share the cores
    flops = counted.flops_per_sequence * config.train.batch_size
    again = recomputed(config, counted)
    travelling = flows(config, sizes, chip)
    local = sum(_local_weights(config, sizes))
    width = 2 if config.model.dtype == "bfloat16" else 4
    kept = 0 if memory is None else memory.kept
    # Weights are written once where they are gathered, and read forward, again and for both
    # gradients; what is kept is written and read.
    parts, of_part = config.train.accumulate, microbatches(config, n_devices)
    through = parts * (4 * width * local * of_part + 2 * kept)
    count, stages = config.mesh.rounds * of_part, config.mesh.stage
    share = n_devices if chip.backend == "cpu" else 1
    step = StepTime(
        compute=flops * (1 + again) / (chips * chip_peak(config, chip) * efficiency),
        memory=through * share / chip.hbm_bandwidth,
        hidden=sum(f.seconds for f in travelling if f.hidden) * share,
        open=sum(f.seconds for f in travelling if not (f.hidden or f.last)) * share,
        last=sum(f.seconds for f in travelling if f.last) * share,
        bubble=(stages - 1) / (count + stages - 1),
        # float32 parameters and two moments read and written, gradients written and read twice.
        update=share * 4 * 9 * _local_params(config, sizes) / chip.hbm_bandwidth,
        recomputed=again,
    )
    return step, travelling


def whole_run(
    config: Config,
    n_devices: int,
    chip: Hardware,
    step: StepTime,
    *,
    tokens: int | None = None,
    mfu: float | None = None,
    price: float | None = None,
) -> Run:
    """Args:
    tokens: None: those of train.steps.
    mfu: None: that of the step; otherwise the step takes what it says.
    price: dollars a chip-hour; None: the table's.
    """
    counted = cost(config.model, config.train.seq_len)
    a_step = config.tokens_per_step
    # A step's FLOPs are a whole number, and so are a run's: Python's ints hold them.
    flops_a_step = counted.flops_per_sequence * config.train.batch_size
    chips = 1 if chip.backend == "cpu" else n_devices
    rate = chips * chip_peak(config, chip)
    seconds = step.seconds if mfu is None else flops_a_step / (rate * mfu)
    tokens = tokens or config.train.steps * a_step
    total = seconds * tokens / a_step
    hours = total / 3600 * chips
    return Run(
        mfu=flops_a_step / (rate * seconds),
        seconds_a_step=seconds,
        tokens_a_second=a_step / seconds,
        tokens=tokens,
        flops=counted.flops_per_sequence * tokens // config.train.seq_len,
        flops_6nd=6 * counted.params_active * tokens,
        days=total / DAY,
        chip_hours=hours,
        dollars=hours * (chip.price if price is None else price),
        kwh=None if chip.watts is None else total * chips * chip.watts / KWH,
    )


def together(runs: Sequence[Run]) -> Run:
    """Of stages one after another; rates and MFU are means over the run."""
    days = sum(run.days for run in runs)
    steps = sum(run.days * DAY / run.seconds_a_step for run in runs)
    tokens = sum(run.tokens for run in runs)
    kwh = [run.kwh for run in runs if run.kwh is not None]
    return Run(
        mfu=sum(run.mfu * run.days for run in runs) / days,
        seconds_a_step=days * DAY / steps,
        tokens_a_second=tokens / (days * DAY),
        tokens=tokens,
        flops=sum(run.flops for run in runs),
        flops_6nd=sum(run.flops_6nd for run in runs),
        days=days,
        chip_hours=sum(run.chip_hours for run in runs),
        dollars=sum(run.dollars for run in runs),
        kwh=sum(kwh) if len(kwh) == len(runs) else None,
    )


def chip_peak(config: Config, chip: Hardware) -> float:
    """The yardstick of MFU: float8's only where the matmuls are."""
    return chip.fp8 if config.model.matmul == "float8" else chip.bf16


def recomputed(config: Config, counted: Cost) -> float:
    """FLOPs computed again in the backward pass, over model FLOPs.

    Experts compute gate and up again where they are not kept (model/moe.py), and attention its
    scores (one of its six products more); with model.remat=full also all of a layer but its last
    matmul of each half, whose result is not needed. A pipeline computes each of its items once more
    (model/pipeline.py).
    """
    m = config.model
    kept = keeps_hidden(m) and config.mesh.expert == 1
    again, in_stages = 0.0, 0.0
    for name, spec in tree.named_leaves(lm_specs(m), is_leaf=is_spec):
        leaf = name.rsplit("/", 1)[-1]
        if spec.inputs and spec.axes[0] == "layers":
            in_stages += 2 * spec.size * (m.top_k / m.n_experts if "experts" in spec.axes else 1)
        if not spec.inputs or leaf.startswith(("wo_", "wdown_", "head_")):
            continue
        experts = "experts" in spec.axes
        if (experts and not kept) or m.remat == "full":
            again += 2 * spec.size * (m.top_k / m.n_experts if experts else 1)
    attention = counted.flops_per_sequence - 6 * counted.params_active * config.train.seq_len
    again = again * config.train.seq_len + max(0, attention) / 6
    if config.mesh.stage > 1:
        again += in_stages * config.train.seq_len + max(0, attention) / 3
    return again / counted.flops_per_sequence


def _local_weights(config: Config, sizes: dict[str, int]) -> list[float]:
    """Elements of the layers' weights on a device while they are used."""
    layers: Any = lm_specs(config.model).layers
    return [_share(spec, mesh_lib.IN_USE, sizes) for _, spec in _leaves(layers)]


def _local_params(config: Config, sizes: dict[str, int]) -> float:
    """Elements of all parameters as they rest on a device."""
    specs = lm_specs(config.model)
    return sum(_share(spec, mesh_lib.STORE, sizes) for _, spec in _leaves(specs))


def _share(spec: Any, rules: mesh_lib.Rules, sizes: dict[str, int]) -> float:
    used = [a for axis in spec.axes for a in rules[axis]]
    return spec.size / math.prod(sizes[a] for a in used)


def _leaves(specs: Any) -> Any:
    return tree.named_leaves(specs, is_leaf=is_spec)
