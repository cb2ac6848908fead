"""Bytes on one device at the worst moment of a training step, without a device or a compiler.

Parameters, moments and batch are exact: shard sizes of run/state.py's own abstract state. What the
step adds is what plan/liveness.py finds in the jaxpr of the real train step, traced on a mesh
without devices; so rematerialisation, exchange buffers, kernels and loss chunks are counted as the
code has them, not as somebody remembered them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.model import pipeline
from jaxmoe.plan.liveness import Held, peak_of
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import abstract_batch, train_step

# Tracing for NVIDIA's cuDNN needs cuDNN, so GPUs are traced with TPU's kernels: both attentions
# keep outputs and log-sum-exps, both expert kernels the same rows.
TRACED_AS = {"cpu": ("cpu", "cpu"), "gpu": ("TPU v5p", "tpu"), "tpu": ("TPU v5p", "tpu")}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters, moments: float32, as they rest.
        batch: tokens and weights.
        gradients: alive at the peak.
        kept: activations (and gathered weights) kept from the forward for the backward pass.
        working: all else alive at the peak: gathered weights, exchange buffers, logits.
        peak: their sum.
        largest: of what is not state, at the peak.
    """

    parameters: int
    moments: int
    batch: int
    gradients: int
    kept: int
    working: int
    largest: tuple[Held, ...] = ()

    @property
    def peak(self) -> int:
        return self.state + self.batch + self.gradients + self.kept + self.working

    @property
    def state(self) -> int:
        return self.parameters + self.moments


def state_bytes(config: Config, n_devices: int) -> tuple[int, int]:
    """Of parameters and of moments, on one device.

    Raises:
        UserError: the mesh does not divide the devices, or a dim.
    """
    state = abstract_state(config, mesh_lib.abstract(config.mesh, n_devices))
    return _bytes(state.params), _bytes(state.opt_state)


def forecast(config: Config, n_devices: int, backend: str) -> Memory:
    """The peak of `train_step`.

    Args:
        backend: "cpu", "gpu" or "tpu".

    Raises:
        UserError: the mesh does not divide the devices, a dim or the batch.
    """
    kind, platform = TRACED_AS[backend]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = mesh_lib.abstract(config.mesh, n_devices, device)
    batch = abstract_batch(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config, mesh)
        traced = train_step.trace(state, batch, config)
    held = peak_of(traced.jaxpr, dict(mesh.shape), cpu=backend == "cpu").held
    parts = {"gradients": 0, "kept": 0, "working": 0}
    for buffer in held:
        parts[_part(buffer)] += buffer.size
    return Memory(
        parameters=_bytes(state.params),
        moments=_bytes(state.opt_state),
        batch=_bytes(batch),
        largest=tuple(sorted(held, key=lambda h: -h.size)[:8]),
        **parts,
    )


def microbatches(config: Config, n_devices: int) -> int:
    """Of the pipeline, in one part of the step; 1 without one."""
    sizes = mesh_lib.sizes(config.mesh, n_devices)
    if sizes["stage"] == 1:
        return 1
    ways = math.prod(sizes[axis] for axis in mesh_lib.BATCH) * config.train.accumulate
    rows = max(1, config.train.batch_size // ways)
    return pipeline.schedule(config.mesh, sizes["stage"], rows).microbatches


def _part(held: Held) -> str:
    if held.inside or held.primitive == "reshard":
        return "working"
    if "transpose(" in held.where:
        return "gradients"
    return "kept" if "jvp(" in held.where else "working"


def _bytes(arrays: Any) -> int:
    """Of one device's shards."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )
