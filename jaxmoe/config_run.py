"""Parts of the config that say how a run is held: evaluation, mesh, checkpoints, forecasts, what
guards it, how it is watched, and the faults that are rehearsed.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from jaxmoe.config_types import LATER, Natural, NonNegative, Positive, Strict

__all__ = [
    "CheckpointConfig",
    "EvalConfig",
    "FaultConfig",
    "ForecastConfig",
    "GuardConfig",
    "HealthConfig",
    "LogConfig",
    "MeshConfig",
]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Strict):
    every: Positive = 50  # steps
    batch_size: Positive = 32  # sequences, over all devices
    # Held-out sets; the first is what is forecast. (): all of the data set, by name.
    sets: tuple[str, ...] = ()
    tokens: Natural = 0  # of each set about so many, whole documents of every domain; 0: all


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Strict):
    """Sizes of the mesh axes, which always exist; 1 is unused, data=-1 takes what is left."""

    replica: Positive = 1  # data parallel across slow links
    stage: Positive = 1  # pipeline
    rounds: Positive = 1  # of it: each stage has so many groups of layers (model/pipeline.py)
    microbatches: Natural = 0  # of it, a multiple of stage; 0: two for each stage, rows allowing
    data: Annotated[int, Field(ge=-1)] = -1  # fully sharded data parallel
    context: Positive = 1  # sequence
    expert: Positive = 1
    model: Positive = 1  # tensor
    emulate: Natural = 0  # CPU devices a process pretends to have; 0: as many as the mesh needs


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Strict):
    every: Positive = 200  # steps
    keep: Positive = 2
    # Steps that are saved besides, and kept beyond `keep`: where other schedules branch off.
    at: tuple[Positive, ...] = ()
    # Beyond `keep`: the first one after every so many tokens, and the best by held-out loss.
    keep_tokens: Natural = field(default=0, metadata=LATER)
    keep_best: Natural = field(default=0, metadata=LATER)
    # A cheap folder (a disk or the memory of this machine) that the newest state is saved to
    # besides, every so many steps; for runs of one process. What is lost there is only newer.
    near: str | None = field(default=None, metadata=LATER)
    near_every: Positive = field(default=50, metadata=LATER)
    # A folder elsewhere (gs://, s3://, file:// or what else tensorstore writes to, run/mirror.py),
    # of this run alone, to which checkpoints and the record are copied behind the training, and
    # from which a run whose directory is lost goes on.
    mirror: str | None = field(default=None, metadata=LATER)
    # Parameters a fresh run starts from: what jaxmoe.convert wrote, or a run's folder.
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class ForecastConfig(Strict):
    first: Positive = 200  # step of the first forecast
    every: Positive = 100  # steps between forecasts; a multiple of eval.every
    # Of the slow alarm (forecast/alarms.py): chance of a false one in a run, at most.
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.01
    # What follows any alarm but that of the registered band, which is only told: nothing but an
    # event, a checkpoint at once, or that and the end of the run (exit code 3).
    on_alarm: Literal["log", "checkpoint", "stop"] = "log"


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Strict):
    """What follows a bad step: one whose loss or gradient is not finite or, with skip and rollback,
    far above those before it (run/guard.py). It decides losses, so it is a part of the recipe."""

    # stop: only what is not finite is bad, and ends the run (exit code 1). skip: the update is left
    # out. rollback: so are all since the newest checkpoint that is `rewind` steps back.
    bad_step: Literal["stop", "skip", "rollback"] = "stop"
    # Standard deviations, of the logs of the 128 good steps before, that a step may be above them.
    sigmas: Annotated[float, Field(gt=0)] = 6.0
    rewind: Natural = 0
    patience: Positive = 8  # bad steps without 64 good ones between them, and the run ends


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Strict):
    """What is watched over while it trains; none of it changes a loss."""

    # Steps between comparisons of what several devices hold the same (run/checksums.py), also made
    # before each checkpoint; 0: never.
    checksum_every: Natural = 100
    # Steps between records of every layer's parameters (run/statistics.py), which are also made at
    # the ten steps after an alarm or a bad step; 0: only there.
    statistics_every: Natural = 200
    # Seconds, after which the stacks of all threads are written and the process ends; 0: never.
    start_deadline: NonNegative = 3600.0  # from the start to the first step, without preparing data
    step_deadline: NonNegative = 1200.0  # of a step, or a batch of an evaluation
    save_deadline: NonNegative = 3600.0  # of what a save waits for
    # Whole seconds without a sign of life of a process, after which the others end. A connection
    # that breaks ends them at once; this is for a frozen machine, and one not yet connected to.
    peer_deadline: Positive = 10
    # A process that takes so many times as long for its own part of a step as the middle one, and
    # by that a tenth of the step, is told as slow.
    slow: Annotated[float, Field(gt=1)] = 2.0


@dataclass(frozen=True, kw_only=True)
class LogConfig(Strict):
    """How a run is watched (docs/watching.md); it changes neither a loss nor the record."""

    # auto: live on a terminal, plain lines elsewhere. quiet: what goes wrong, and the end.
    terminal: Literal["auto", "live", "plain", "quiet"] = "auto"
    tensorboard: bool = False  # event files in the run directory
    # Project of Weights & Biases; offline, in the run directory, unless WANDB_MODE says otherwise.
    wandb: Annotated[str, Field(min_length=1)] | None = None
    # Updates, from 1, at which the first process begins a trace by jax.profiler of so many.
    profile_at: tuple[Positive, ...] = ()
    profile_steps: Positive = 3


FAULTS = Literal[
    "kill",
    "hang",
    "slow",
    "nan-gradient",
    "flip-gradient",
    "flip-parameter",
    "zero-expert",
    "rate-slip",
    "duplicate-data",
    "truncate-checkpoint",
    "flip-checkpoint",
    "disk-full",
    "damage-shard",
]


@dataclass(frozen=True, kw_only=True)
class FaultConfig(Strict):
    """A fault to rehearse (run/faults.py): struck once in a run, before update `step`, or after the
    checkpoint of that step. One place in a gradient: that of the first such fault goes for all."""

    kind: FAULTS
    step: Positive
    rank: Natural = 0  # process, of kill, hang, slow and disk-full
    device: Natural = 0  # of the mesh, by number; of what strikes a parameter or gradient
    array: str = ""  # part of a parameter's name; "": the first
    bit: Annotated[int, Field(ge=0, lt=32)] = 30  # of a float32: 31 is the sign, 23 to 30 exponent
    index: Natural = 0  # of the element, in the part that the device holds; of the shard of data
    expert: Natural = 0  # of zero-expert, in all layers
    factor: float = 10.0  # of rate-slip
    seconds: NonNegative = 1.0  # of slow, each step
    steps: Positive = 1  # how long slow, rate-slip and duplicate-data last
