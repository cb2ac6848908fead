"""What the chips can do, as data. docs/plan.md says where each figure comes from.

Sources: [a100] NVIDIA A100 datasheet; [h100] NVIDIA H100 datasheet (dense figures, half of those
"with sparsity"); [h200] NVIDIA H200 datasheet; [b200] NVIDIA DGX B200 datasheet, an eighth of it;
[dgx] user guides of DGX A100 (6.5 kW), H100 and H200 (10.2 kW), B200 (14.3 kW): most power, and
one network port a GPU of 200 (A100) or 400 Gb/s; [tpu] cloud.google.com/tpu/docs/v5e, v5p, v6e;
[price] on-demand list prices as found in 2026 (GPUs: mid of "specialty" clouds,
mercatus-ai.com/blog/cloud-gpu-pricing, May 2026; TPUs: cloud.google.com/tpu/pricing, US).
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.run import platform

GB, TFLOP = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One chip and what connects it. Bandwidths are bytes a second in one direction.

    Attributes:
        bf16, fp8: dense peak, FLOP/s; fp8 = bf16 where there is no faster way.
        hbm: bytes.
        hbm_bandwidth: reads and writes together.
        link: of one chip to the others of its island (NVLink, ICI), all its links together.
        island: chips that `link` connects: a host of GPUs, a slice of TPUs.
        network: of one chip to other islands.
        watts: of a chip with its share of the host, at most; None: nobody says.
        price: dollars a chip-hour.
        efficiency: share of the peak that the compute of a step attains by default (docs/plan.md).
        backend: whose compiler decides what is in memory.
    """

    name: str
    bf16: float
    fp8: float
    hbm: float
    hbm_bandwidth: float
    link: float
    island: int
    network: float
    watts: float | None
    price: float
    efficiency: float = 0.6
    backend: Literal["cpu", "gpu", "tpu"] = "gpu"


def _gpu(name: str, watts: float, price: float, figures: Mapping[str, float]) -> Hardware:
    """A host has eight."""
    return Hardware(
        name=name,
        bf16=figures["bf16"] * TFLOP,
        fp8=figures["fp8"] * TFLOP,
        hbm=figures["hbm"] * GB,
        hbm_bandwidth=figures["bandwidth"] * GB,
        link=figures["nvlink"] / 2 * GB,
        island=8,
        network=figures["port"] / 8 * GB,
        watts=watts / 8,
        price=price,
    )


def _tpu(name: str, island: int, price: float, figures: Mapping[str, float]) -> Hardware:
    return Hardware(
        name=name,
        bf16=figures["bf16"] * TFLOP,
        fp8=figures["bf16"] * TFLOP,
        hbm=figures["hbm"] * 2**30,
        hbm_bandwidth=figures["bandwidth"] * GB,
        link=figures["ici"] / 2 * GB,
        island=island,
        network=figures["dcn"] / 8 * GB,
        watts=None,
        price=price,
        backend="tpu",
    )


# TFLOP/s, GB, GB/s; NVLink and ICI for both directions together, as they are quoted; network port
# and DCN in Gb/s a chip (of a pod, over its chips).
_A100 = {"bf16": 312, "fp8": 312, "hbm": 80, "bandwidth": 2039, "nvlink": 600, "port": 200}
_A100_40 = {**_A100, "hbm": 40, "bandwidth": 1555}
_H100 = {"bf16": 989.4, "fp8": 1978.9, "hbm": 80, "bandwidth": 3350, "nvlink": 900, "port": 400}
_H200 = {**_H100, "hbm": 141, "bandwidth": 4800}
_B200 = {"bf16": 2250, "fp8": 4500, "hbm": 180, "bandwidth": 8000, "nvlink": 1800, "port": 400}
_V5E = {"bf16": 197, "hbm": 16, "bandwidth": 819, "ici": 400, "dcn": 6400 / 256}
_V5P = {"bf16": 459, "hbm": 95, "bandwidth": 2765, "ici": 1200, "dcn": 50}
_V6E = {"bf16": 918, "hbm": 32, "bandwidth": 1638, "ici": 800, "dcn": 25_600 / 256}

_CHIPS = (
    _gpu("a100", 6500, 1.30, _A100),  # [a100] [dgx] [price]
    _gpu("a100-40gb", 6500, 1.10, _A100_40),
    _gpu("h100", 10_200, 3.00, _H100),  # [h100] [dgx] [price]
    _gpu("h200", 10_200, 4.00, _H200),  # [h200] [dgx] [price]
    _gpu("b200", 14_300, 6.00, _B200),  # [b200] [dgx]; the price is our guess: two H100
    _tpu("v5e", 256, 1.20, _V5E),  # [tpu] [price]
    _tpu("v5p", 6144, 4.20, _V5P),  # [tpu] [price]; the largest slice that can be had
    _tpu("v6e", 256, 2.70, _V6E),  # [tpu] [price]
)

TABLE = {chip.name: chip for chip in _CHIPS}
NAMES = (*TABLE, "cpu")


def find(name: str) -> Hardware:
    """The chip of that name; "cpu" is this machine, measured (about a second).

    Raises:
        UserError: there is none.
    """
    if name == "cpu":
        return _this_machine()
    if name not in TABLE:
        raise UserError(f"--hardware {name}: there are {', '.join(NAMES)}")
    return TABLE[name]


def _this_machine() -> Hardware:
    """All cores as one device: emulated devices share them, and its memory is their network."""
    peak, bandwidth = platform.measured_peak("float32"), _copy_bandwidth()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name="cpu",
        bf16=peak,
        fp8=peak,
        hbm=memory,
        hbm_bandwidth=bandwidth,
        link=bandwidth / 2,
        island=1 << 20,
        network=bandwidth / 2,
        watts=None,
        price=0.0,
        # Five shapes of benchmarks/step.py on 2 quiet cores: docs/plan.md.
        efficiency=0.5,
        backend="cpu",
    )


def _copy_bandwidth(seconds: float = 0.2) -> float:
    """Bytes read and written a second by the best copy of 64 MiB seen."""
    source = np.ones(16 << 20, np.float32)
    target = np.empty_like(source)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best
