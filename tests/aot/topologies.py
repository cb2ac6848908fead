"""Devices that are not here, for their real compilers to compile for; a skip where one is missing.

TPU needs `pip install libtpu`. H100 needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's own
version with the nvidia wheels they load, but neither a GPU nor a driver.
"""

import importlib.util
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

# Figures of an H100 SXM with 80 GB: what the compiler would otherwise ask the driver.
H100 = Path(__file__).with_name("h100_target.txtpb")


@cache
def devices(kind: str) -> list[Any]:
    """kind: "h100" (one host of eight) or a TPU topology such as "v5p:2x2x2"."""
    if kind == "h100":
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            pytest.skip("jax-cuda13-plugin is not installed: nothing compiles for H100")
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask
        # partitions x hosts x GPUs of a host
        options = {"topology": "1x1x8", "target_config": H100.read_text()}
        found = topologies.get_topology_desc(platform="cuda", topology_name=kind, **options)
        return list(found.devices)
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing compiles for TPU")
    # Otherwise it looks for a metadata server, and for its fellow workers.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=kind).devices)


def mesh(kind: str, **axes: int) -> Mesh:
    """An explicit mesh over as many of the devices as the sizes multiply to."""
    some = np.array(devices(kind)[: math.prod(axes.values())], object)
    shape = tuple(axes.values())
    return Mesh(some.reshape(shape), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
