"""Devices that are not here, for their real compilers to compile for.

TPU programs need `pip install 'jaxmoe[aot-tpu]'`, GPU programs `pip install 'jaxmoe[aot-cuda]'`
(4.4 GB), but neither a chip nor a driver.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jax.experimental import topologies

from jaxmoe.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Attributes:
    backend: "tpu" or "gpu".
    dims: numbers in a topology: of TPU chips along each axis; hosts and GPUs of a host.
    hbm: bytes that a program may use.
    """

    backend: str
    dims: int
    hbm: int


# For TPUs what libtpu 0.0.42 names as available when a program does not fit; for GPUs all of it,
# from which the allocator takes XLA_PYTHON_CLIENT_MEM_FRACTION (0.75 by default).
CHIPS: Mapping[str, Chip] = {
    "v5p": Chip(backend="tpu", dims=3, hbm=round(95.74 * GIB)),
    "v5e": Chip(backend="tpu", dims=2, hbm=round(15.75 * GIB)),
    "v6e": Chip(backend="tpu", dims=2, hbm=round(31.25 * GIB)),
    "h100": Chip(backend="gpu", dims=2, hbm=84_942_979_072),
    "h200": Chip(backend="gpu", dims=2, hbm=150_754_820_096),
}

# What differs between an H100 SXM and an H200, which has the same processor: memory (NVIDIA's data
# sheet: 4.8 TB/s; 143,771 MiB as nvidia-smi counts) and the name.
_H200 = {
    "memory_bandwidth: 3352320000000": "memory_bandwidth: 4800000000000",
    "device_memory_size: 84942979072": "device_memory_size: 150754820096",
    "NVIDIA H100 80GB HBM3": "NVIDIA H200",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Attributes:
    text: as the user wrote it.
    chip: a key of CHIPS.
    shape: chips along each axis of a slice; or hosts, and GPUs of a host.
    slices: of TPUs, joined by slow links.
    """

    text: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def backend(self) -> str:
        return CHIPS[self.chip].backend

    @property
    def hbm(self) -> int:
        return CHIPS[self.chip].hbm

    @property
    def n_devices(self) -> int:
        return math.prod(self.shape) * self.slices


def parse(text: str) -> Target:
    """`tpu:v5p:16x16x16`, `tpu:v5e:16x16:2` (two slices), `h100:64x8` (hosts x GPUs of a host).

    Raises:
        UserError: an unknown chip, or sizes that are not its.
    """
    found = re.fullmatch(r"(tpu:)?(\w+):(\d+(?:x\d+)+)(?::(\d+))?", text)
    chip = CHIPS.get(found[2]) if found else None
    if found is None or chip is None or bool(found[1]) != (chip.backend == "tpu"):
        raise _unknown(text)
    shape = tuple(map(int, found[3].split("x")))
    slices = int(found[4] or 1)
    if len(shape) != chip.dims or 0 in (*shape, slices) or (found[4] and chip.backend == "gpu"):
        raise _unknown(text)
    return Target(text=text, chip=found[2], shape=shape, slices=slices)


def _unknown(text: str) -> UserError:
    forms = []
    for name, chip in CHIPS.items():
        sizes = "HOSTSxGPUS" if chip.backend == "gpu" else "x".join("XYZ"[: chip.dims])
        forms.append(f"{'tpu:' if chip.backend == 'tpu' else ''}{name}:{sizes}")
    return UserError(
        f"--compile {text}: write one of {', '.join(forms)}; behind a TPU's sizes :N for N slices"
    )


@cache
def devices(target: Target) -> tuple[Any, ...]:
    """Devices to compile for, in JAX's order.

    Raises:
        UserError: the compiler is not installed, or refuses the topology.
    """
    missing = missing_package(target.backend)
    if missing:
        extra = "aot-tpu" if target.backend == "tpu" else "aot-cuda"
        raise UserError(
            f"--compile {target.text}: {missing} is not installed; pip install 'jaxmoe[{extra}]'"
        )
    try:
        found = _tpus(target) if target.backend == "tpu" else _gpus(target)
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        line = str(error).strip().splitlines()[0]
        raise UserError(f"--compile {target.text}: {line}") from error
    return tuple(found)


def missing_package(backend: str) -> str | None:
    """What its compiler comes in, where that is not installed."""
    wanted = "libtpu" if backend == "tpu" else "jax_cuda13_plugin"
    return None if importlib.util.find_spec(wanted) else wanted.replace("_", "-")


def gpu_target(chip: str) -> str:
    """The GpuTargetConfig (text proto) of a GPU: what XLA would otherwise ask the driver."""
    text = files("jaxmoe.plan").joinpath("h100_target.txtpb").read_text()
    if chip == "h100":
        return text
    for ours, theirs in _H200.items():
        assert ours in text, ours
        text = text.replace(ours, theirs)
    return text


def _tpus(target: Target) -> Any:
    # Otherwise libtpu looks for a metadata server and for its fellow workers, and one process at a
    # time holds a lock that is for those who use chips.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{target.chip}:{'x'.join(map(str, target.shape))}"
    more = {"num_slices": target.slices} if target.slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def _gpus(target: Target) -> Any:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask
    hosts, gpus = target.shape
    # partitions x hosts x GPUs of a host
    options = {"topology": f"1x{hosts}x{gpus}", "target_config": gpu_target(target.chip)}
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target.chip, **options
    ).devices
