"""Published 8- and 4-bit weights, read as bfloat16.

DeepSeek-V3: float8 with a float32 scale for each block of 128 x 128 (arXiv:2412.19437, section
3.3.2). gpt-oss: MXFP4, 32 values of 4 bits share a power of two (OCP Microscaling Formats v1.0).
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxmoe.convert.safetensors import Tensor
from jaxmoe.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 128
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4 = np.concatenate([E2M1, -E2M1])
BYTES = np.arange(256)
PAIRS = np.stack([FP4[BYTES & 15], FP4[BYTES >> 4]], axis=-1)  # the two values of a byte


@dataclass(frozen=True)
class Float8:
    """theirs [out, in] and its scales."""

    values: Tensor
    scales: Tensor
    dtype: np.dtype = BFLOAT16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        assert (start, stop) == (0, None)  # no tensor that is read by rows comes in float8
        out = np.empty(self.shape, self.dtype)
        values, scales = self.values.read(), self.scales.read()
        for i in range(len(scales)):
            rows = slice(i * BLOCK, (i + 1) * BLOCK)
            wide = np.repeat(scales[i], BLOCK)[: self.shape[1]]
            out[rows] = (values[rows].astype(np.float32) * wide).astype(self.dtype)
        return out


@dataclass(frozen=True)
class MxFp4:
    """blocks [E, out, in / 32, 16], two values a byte, the lower half first; scales [E, out,
    in / 32], biased exponents. Read as [E, in, out]."""

    blocks: Tensor
    scales: Tensor
    dtype: np.dtype = BFLOAT16

    @property
    def shape(self) -> tuple[int, ...]:
        e, out, groups, half = self.blocks.shape
        return (e, groups * half * 2, out)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """All of it, or some experts."""
        blocks, scales = self.blocks.read(start, stop), self.scales.read(start, stop)
        result = np.empty((len(blocks), *self.shape[1:]), self.dtype)
        for e in range(len(blocks)):
            values = PAIRS[blocks[e]].reshape(*blocks[e].shape[:2], -1)
            values *= np.ldexp(np.float32(1), scales[e].astype(np.int32) - 127)[..., None]
            result[e] = values.reshape(len(values), -1).T.astype(self.dtype)
        return result


Source = Tensor | Float8 | MxFp4


def unpacked(found: dict[str, Tensor]) -> dict[str, Source]:
    """The tensors by the names they have without quantisation."""
    sources: dict[str, Source] = {}
    for name, tensor in found.items():
        if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in found:
            continue
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in found:
            continue
        base = name.removesuffix("_blocks")
        if base != name and base + "_scales" in found:
            sources[base] = _checked(MxFp4(tensor, found[base + "_scales"]))
        elif name + "_scale_inv" in found:
            sources[name] = _checked(Float8(tensor, found[name + "_scale_inv"]))
        else:
            sources[name] = tensor
    return sources


def _checked(source: Float8 | MxFp4) -> Float8 | MxFp4:
    """Other sizes of blocks would be read as other numbers."""
    if isinstance(source, Float8):
        values, wanted = source.values, tuple(-(-n // BLOCK) for n in source.values.shape)
        good = len(wanted) == 2
    else:
        values, wanted = source.blocks, source.blocks.shape[:-1]
        good = len(wanted) == 3 and values.shape[-1] == 16
    if not good or source.scales.shape != wanted:
        raise UserError(
            f"{source.scales.file}: scales of the shape {source.scales.shape} do not fit values of"
            f" the shape {values.shape}: read are float8 by blocks of {BLOCK} x {BLOCK}, and MXFP4"
        )
    return source
