"""What differs between the versions of JAX that are supported: one place for it."""

from typing import Any

import jax
from jax.sharding import AxisType


def keep_free_axes() -> None:
    """Mends jax 0.10, where a `shard_map` over some axes of an explicit mesh first gathers its
    operands over all the others, and slices them again inside: for the layers of a pipeline's stage
    that is every parameter, whole, on every device.

    There the operands' shardings are lowered from `in_specs`, which cannot name the other axes
    (shard_map.py, `_shardy_shard_map_sharding`). From 0.12 on they are those of the types,
    and 0.11 leaves them open; this does as 0.12 does. tests/model/test_pipeline.py holds it.
    """
    if jax.__version_info__ >= (0, 11):
        return
    from jax._src import shard_map as module

    lowered: Any = module._shardy_shard_map_sharding
    if getattr(lowered, "keeps_free_axes", False):
        return

    def sharding(ctx: Any, mesh: Any, manual_axes: Any, spec: Any, aval: Any) -> Any:
        types = set(aval.sharding.mesh.axis_types)
        if len(manual_axes) < len(mesh.axis_names) and types <= {
            AxisType.Explicit,
            AxisType.Manual,
        }:
            spec = aval.sharding.spec
        return lowered(ctx, mesh, manual_axes, spec, aval)

    sharding.keeps_free_axes = True  # type: ignore[attr-defined]
    module._shardy_shard_map_sharding = sharding


def coordination_client() -> Any:
    """The key-value store that all processes of a run see; JAX has no public name for it.

    Raises:
        RuntimeError: this is a run of one process.
    """
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise RuntimeError("a run of one process has no coordination service")
    return distributed.global_state.client


def joined_processes() -> int:
    """Of `jax.distributed`, without starting a backend, as `jax.process_count` would: the number
    of emulated devices hangs on it, and must be said before."""
    from jax._src.distributed import global_state

    return global_state.num_processes


def in_tpu_vm() -> bool:
    """Whether JAX found TPU chips and their library when it was imported."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm
