"""Grouped matmul in Pallas-Triton kernels, for Ampere and Hopper.

A tile of rows begins where its group begins, so every program multiplies with one matrix; the
ragged end of a group is masked. Addresses are computed in the kernels, since such tiles lie on no
grid of blocks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxmoe.kernels.grouped_tiles import bounds, out_shape, precision_of, row_tiles

Array = jax.Array


@dataclass(frozen=True)
class Blocks:
    """A program's tile of the output is [m, n]; it reads k of the summed dim at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# NOT tuned: no GPU was at hand. Chosen to fit an H100: operands of all stages within 227 KiB of
# shared memory, sums within 128 registers a thread (two sums in the fused SwiGLU kernel, hence more
# warps). To tune, time forward and backward of the layer's shapes for m, n in 64 to 256, k in 32 to
# 128, 4 or 8 warps and 2 to 5 stages, and write the best into these tables. Mean rows of a group
# at least the first number -> blocks; float32 is multiplied as such, without tensor cores.
ROW_BLOCKS = {
    "bfloat16": (
        (128, Blocks(m=128, n=128, k=64, warps=8, stages=4)),
        (48, Blocks(m=64, n=128, k=64, warps=4, stages=4)),
        (0, Blocks(m=16, n=128, k=64, warps=4, stages=4)),
    ),
    "float32": (
        (64, Blocks(m=64, n=64, k=32, warps=4, stages=2)),
        (0, Blocks(m=16, n=64, k=32, warps=4, stages=2)),
    ),
}
WEIGHT_BLOCKS = {
    "bfloat16": Blocks(m=128, n=128, k=64, warps=8, stages=3),
    "float32": Blocks(m=64, n=64, k=32, warps=4, stages=2),
}
SWIGLU_STAGES = 3  # three operands a stage instead of two


def matmul_rows(
    x_SK: Array, w_EDF: Array, sizes_E: Array, *, transposed: bool, interpret: bool
) -> Array:
    """x @ w, or x @ w.T where `transposed`, by groups; zeros beyond the sum."""
    return _rows(x_SK, (w_EDF,), sizes_E, transposed, interpret)


def swiglu_rows(
    x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array, *, interpret: bool
) -> Array:
    """silu(x @ wgate) * (x @ wup) by groups, both sums in one pass over x."""
    return _rows(x_SD, (wgate_EDF, wup_EDF), sizes_E, False, interpret)


def matmul_weights(x_SD: Array, dy_SF: Array, sizes_E: Array, *, interpret: bool) -> Array:
    """x.T @ dy of each group's rows, in the dtype of x; zeros for a group without rows."""
    (rows, d), f, e = x_SD.shape, dy_SF.shape[1], len(sizes_E)
    _check_offsets(x_SD.size, dy_SF.size, e * d * f)
    blocks = _clipped(WEIGHT_BLOCKS[str(x_SD.dtype)], m=d, n=f, k=rows)
    starts_G, ends_G = bounds(sizes_E, rows)
    return pl.pallas_call(
        partial(_weights_kernel, blocks),
        grid=(pl.cdiv(f, blocks.n), pl.cdiv(d, blocks.m), e),
        out_shape=out_shape((e, d, f), x_SD.dtype, like=x_SD),
        compiler_params=_params(blocks),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(starts_G, ends_G, x_SD, dy_SF)


def _rows(
    x_SK: Array, ws_EDF: tuple[Array, ...], sizes_E: Array, transposed: bool, interpret: bool
) -> Array:
    (rows, k), (e, d, f) = x_SK.shape, ws_EDF[0].shape
    n = d if transposed else f
    _check_offsets(x_SK.size, ws_EDF[0].size, rows * n)
    table = ROW_BLOCKS[str(x_SK.dtype)]
    blocks = next(blocks for least, blocks in table if rows // e >= least)
    blocks = _clipped(blocks, m=blocks.m, n=n, k=k)
    tiles = row_tiles(sizes_E, rows, blocks.m)
    return pl.pallas_call(
        partial(_rows_kernel, blocks, transposed),
        # Tiles of columns first: they share their rows, and often their matrix with the next.
        grid=(pl.cdiv(n, blocks.n), len(tiles.group_t)),
        out_shape=out_shape((rows, n), x_SK.dtype, like=x_SK),
        compiler_params=_params(blocks, most=SWIGLU_STAGES if len(ws_EDF) == 2 else None),
        interpret=interpret,
        name="grouped_swiglu_rows" if len(ws_EDF) == 2 else "grouped_matmul_rows",
    )(tiles.group_t, tiles.start_t, tiles.end_t, x_SK, *ws_EDF)


def _rows_kernel(
    blocks: Blocks, transposed: bool, group_ref: Any, start_ref: Any, end_ref: Any, x_ref: Any,
    *refs: Any,
) -> None:  # fmt: skip
    """One tile of x @ w, or of silu(x @ w0) * (x @ w1)."""
    *w_refs, y_ref = refs
    n, tile = pl.program_id(0), pl.program_id(1)
    group, start, end = group_ref[tile], start_ref[tile], end_ref[tile]
    k_total, n_total = x_ref.shape[1], y_ref.shape[1]
    precision = precision_of(x_ref.dtype)
    in_m, in_n = _range(start, blocks.m) < end, _inside(n, blocks.n, n_total)

    def step(i: Array, sums: Any) -> Any:
        in_k = _inside(i, blocks.k, k_total)
        at_k, at_n = pl.ds(i * blocks.k, blocks.k), pl.ds(n * blocks.n, blocks.n)
        x_mk = _load(x_ref.at[pl.ds(start, blocks.m), at_k], in_m, in_k)
        out = []
        for total_mn, w_ref in zip(sums, w_refs, strict=True):
            if transposed:
                w_nk = _load(w_ref.at[group, at_n, at_k], in_n, in_k)
                own_mn = plgpu.dot(x_mk, w_nk, trans_b=True, precision=precision)
            else:
                w_kn = _load(w_ref.at[group, at_k, at_n], in_k, in_n)
                own_mn = plgpu.dot(x_mk, w_kn, precision=precision)
            out.append(total_mn + own_mn)
        return tuple(out)

    # Nothing to add for the rows beyond all groups, which are stored as zeros, nor without rows.
    live = (group < w_refs[0].shape[0]) & (start < end)
    # A product: Pallas lowers the `where` of two constants to a one-bit bound (jax 0.10.2).
    steps = live.astype(jnp.int32) * pl.cdiv(k_total, blocks.k)
    zeros_mn = jnp.zeros((blocks.m, blocks.n), jnp.float32)
    y_mn, *up_mn = jax.lax.fori_loop(0, steps, step, (zeros_mn,) * len(w_refs))
    if up_mn:
        y_mn = y_mn * jax.nn.sigmoid(y_mn) * up_mn[0]
    plgpu.store(
        y_ref.at[pl.ds(start, blocks.m), pl.ds(n * blocks.n, blocks.n)],
        y_mn.astype(y_ref.dtype),
        mask=_mask(in_m, in_n),
    )


def _weights_kernel(
    blocks: Blocks, starts_ref: Any, ends_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any
) -> None:
    """One tile of a group's x.T @ dy."""
    n, m, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, end = starts_ref[group], ends_ref[group]
    in_m = _inside(m, blocks.m, dw_ref.shape[1])
    in_n = _inside(n, blocks.n, dw_ref.shape[2])
    at_m, at_n = pl.ds(m * blocks.m, blocks.m), pl.ds(n * blocks.n, blocks.n)
    precision = precision_of(x_ref.dtype)

    def step(i: Array, total_mn: Array) -> Array:
        at = start + i * blocks.k
        # Both sides: what lies outside may be a NaN, and 0 * NaN is one.
        in_k = _range(at, blocks.k) < end
        x_km = _load(x_ref.at[pl.ds(at, blocks.k), at_m], in_k, in_m)
        dy_kn = _load(dy_ref.at[pl.ds(at, blocks.k), at_n], in_k, in_n)
        return total_mn + plgpu.dot(x_km, dy_kn, trans_a=True, precision=precision)

    steps = pl.cdiv(end - start, blocks.k)
    zeros_mn = jnp.zeros((blocks.m, blocks.n), jnp.float32)
    dw_mn = jax.lax.fori_loop(0, steps, step, zeros_mn)
    dw_mn = dw_mn.astype(dw_ref.dtype)
    plgpu.store(dw_ref.at[group, at_m, at_n], dw_mn, mask=_mask(in_m, in_n))


def _range(start: Any, n: int) -> Array:
    return start + jnp.arange(n, dtype=jnp.int32)


def _inside(i: Any, block: int, total: int) -> Array | None:
    """Which of the i-th block's are inside of a dim; None: all of them, whatever i is."""
    return None if total % block == 0 else _range(i * block, block) < total


def _mask(in_rows: Array | None, in_columns: Array | None) -> Array | None:
    if in_rows is None:
        return None if in_columns is None else in_columns[None, :]
    return in_rows[:, None] if in_columns is None else in_rows[:, None] & in_columns[None, :]


def _load(ref: Any, in_rows: Array | None, in_columns: Array | None) -> Array:
    mask = _mask(in_rows, in_columns)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def _clipped(blocks: Blocks, *, m: int, n: int, k: int) -> Blocks:
    """No larger than the dims need; at least 16, the smallest of a tensor core's product."""
    m, n, k = (max(16, pl.next_power_of_2(dim)) for dim in (m, n, k))
    return Blocks(min(blocks.m, m), min(blocks.n, n), min(blocks.k, k), blocks.warps, blocks.stages)


def _params(blocks: Blocks, most: int | None = None) -> plgpu.CompilerParams:
    # The class is what chooses Triton over Mosaic GPU.
    stages = blocks.stages if most is None else min(blocks.stages, most)
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=stages)


def _check_offsets(*sizes: int) -> None:
    # Pallas computes addresses in int32, and a larger one would wrap without a word.
    if max(sizes) >= 1 << 31:
        raise ValueError(f"the Triton path holds arrays of under 2**31 elements, not {max(sizes)}")
