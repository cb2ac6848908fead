"""Meshes over some of the eight emulated devices, for every test that needs one."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh
from jaxmoe.config import MeshConfig
from jaxmoe.spec import map_specs


def on(**axes: int) -> Mesh:
    """As many of the eight devices as the sizes multiply to; an axis that is left out is 1."""
    return mesh.over(MeshConfig(**{"data": 1, **axes}), jax.devices()[: math.prod(axes.values())])


# A batch as the model is given it: its first dim over the axes that share a batch.
ROWS = P(mesh.BATCH)
# An activation, or integers that a layer is given; positions are in natural order on one shard.
TOKENS = P(mesh.BATCH, "context")


def put_params(where: Mesh, params: Any, specs: Any) -> Any:
    """Parameters as a layer uses them: gathered, but for the tensor and expert axes."""
    return put(where, params, map_specs(lambda s: mesh.partition(s, mesh.COMPUTE), specs))


def hlo(compiled: Any) -> str:
    """The text of a compiled program."""
    return compiled.as_text()


def put(where: Mesh, tree: Any, specs: Any = ROWS) -> Any:
    """Arrays onto a mesh; one spec for all of them, or a tree of specs."""
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(where, spec), specs))
