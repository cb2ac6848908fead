"""Meshes of devices that are not here (jaxmoe.plan.topologies); a skip without their compiler."""

import math
from functools import cache
from typing import Any

import pytest
from jax.sharding import Mesh

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import MeshConfig
from jaxmoe.plan import topologies


def need(backend: str) -> None:
    missing = topologies.missing_package(backend)
    if missing:
        pytest.skip(f"{missing} is not installed: nothing compiles for its chips")


@cache
def devices(target: str) -> tuple[Any, ...]:
    """target: "h100:1x8", "tpu:v5p:2x2x2" ..."""
    parsed = topologies.parse(target)
    need(parsed.backend)
    return topologies.devices(parsed)


def mesh(target: str, **axes: int) -> Mesh:
    """All six axes over as many of the devices as the sizes multiply to; an axis that is left out
    is 1."""
    config = MeshConfig(**{"data": 1, **axes})
    some = devices(target)[: math.prod(axes.values())]
    return mesh_lib.over(config, some)
