"""Grouped matmul in Pallas kernels for TPU (Mosaic).

Why not the megablox of jax itself: it declares no `manual_axis_type`, so that a checked `shard_map`
refuses it, it leaves rows beyond the sum undefined, and it wants whole blocks of rows. The scheme
is its own: aligned blocks of rows, visited once by each group that has rows in them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.kernels.grouped_tiles import Tiles, out_shape, precision_of, visits

Array = jax.Array

# NOT tuned: no TPU was at hand. Two buffers of each operand and the float32 sums take 11 MiB of the
# 16 MiB of VMEM that the compiler gives a kernel by default; float32 of the same size did not fit.
# Rows: a visit costs a whole block, so about as many as a group has. To tune, time the layer's
# shapes over multiples of 128.
MIN_ROWS, MAX_ROWS = 128, 512
MAX_SIDE = {"bfloat16": 1024, "float32": 512}


def matmul_rows(
    x_SK: Array, w_EDF: Array, sizes_E: Array, *, transposed: bool, interpret: bool
) -> Array:
    """x @ w, or x @ w.T where `transposed`, by groups; zeros beyond the sum."""
    (rows, k), (e, d, f) = x_SK.shape, w_EDF.shape
    n = d if transposed else f
    side = MAX_SIDE[str(x_SK.dtype)]
    block_m, block_n, block_k = _row_block(rows, e), min(side, n), _summed_block(k, side)
    tiles = visits(sizes_E, rows, block_m, empty=False)

    last = pl.cdiv(k, block_k) - 1

    # Steps left over ask for what is there already, and so wait for nothing.
    def at_x(j: Any, t: Any, i: Any, tiles: Tiles) -> Any:
        return tiles.block_t[t], jnp.where(tiles.end_t[t] > 0, i, last)

    def at_w(j: Any, t: Any, i: Any, tiles: Tiles) -> Any:
        group, i = jnp.minimum(tiles.group_t[t], e - 1), jnp.where(tiles.end_t[t] > 0, i, last)
        return (group, j, i) if transposed else (group, i, j)

    w_block = (None, block_n, block_k) if transposed else (None, block_k, block_n)
    return pl.pallas_call(
        partial(_rows_kernel, transposed, e, k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, block_n), len(tiles.group_t), last + 1),
            in_specs=[
                pl.BlockSpec((block_m, block_k), at_x),
                pl.BlockSpec(w_block, at_w),
            ],
            out_specs=pl.BlockSpec(
                (block_m, block_n), lambda j, t, i, tiles: (tiles.block_t[t], j)
            ),
            scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        ),
        out_shape=out_shape((rows, n), x_SK.dtype, like=x_SK),
        compiler_params=_params(),
        interpret=interpret,
        name="grouped_matmul_rows",
    )(tiles, x_SK, w_EDF)


def matmul_weights(x_SD: Array, dy_SF: Array, sizes_E: Array, *, interpret: bool) -> Array:
    """x.T @ dy of each group's rows, in the dtype of x; zeros for a group without rows."""
    (rows, d), f, e = x_SD.shape, dy_SF.shape[1], len(sizes_E)
    side = MAX_SIDE[str(x_SD.dtype)]
    block_m, block_d, block_f = _row_block(rows, e), min(side, d), min(side, f)
    tiles = visits(sizes_E, rows, block_m, empty=True)
    return pl.pallas_call(
        _weights_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(f, block_f), pl.cdiv(d, block_d), len(tiles.group_t)),
            in_specs=[
                pl.BlockSpec((block_m, block_d), lambda j, i, t, tiles: (tiles.block_t[t], i)),
                pl.BlockSpec((block_m, block_f), lambda j, i, t, tiles: (tiles.block_t[t], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, block_d, block_f), lambda j, i, t, tiles: (tiles.group_t[t], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((block_d, block_f), jnp.float32)],
        ),
        out_shape=out_shape((e, d, f), x_SD.dtype, like=x_SD),
        compiler_params=_params(),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(tiles, x_SD, dy_SF)


def swiglu_rows(
    x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array, *, interpret: bool
) -> Array:
    """silu(x @ wgate) * (x @ wup) by groups."""
    matmul = partial(matmul_rows, transposed=False, interpret=interpret)
    gate_SF, up_SF = matmul(x_SD, wgate_EDF, sizes_E), matmul(x_SD, wup_EDF, sizes_E)
    hidden_SF = jax.nn.silu(gate_SF.astype(jnp.float32)) * up_SF.astype(jnp.float32)
    return hidden_SF.astype(x_SD.dtype)


def _rows_kernel(
    transposed: bool, e: int, k: int, tiles: Tiles, x_ref: Any, w_ref: Any, y_ref: Any,
    total_ref: Any,
) -> None:  # fmt: skip
    t, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    # For the rows beyond all groups the zeros remain.
    @pl.when((tiles.group_t[t] < e) & (tiles.end_t[t] > 0))
    def _() -> None:
        of_w = 1 if transposed else 0
        x_mk, w = _up_to(k, i, x_ref[...], 1), _up_to(k, i, w_ref[...], of_w)
        total_ref[...] += _dot(x_mk, w, (((1,), (of_w,)), ((), ())))

    # All visits of a block follow one another and their rows make up the block: what the first of
    # them keeps of an unwritten buffer is written by the others.
    @pl.when((i == pl.num_programs(2) - 1) & (tiles.end_t[t] > 0))
    def _() -> None:
        y_mn = jnp.where(_inside(tiles, t, y_ref.shape), total_ref[...], _wide(y_ref[...]))
        y_ref[...] = y_mn.astype(y_ref.dtype)


def _weights_kernel(tiles: Tiles, x_ref: Any, dy_ref: Any, dw_ref: Any, total_ref: Any) -> None:
    t, last = pl.program_id(2), pl.num_programs(2) - 1
    group = tiles.group_t[t]

    @pl.when((t == 0) | (tiles.group_t[jnp.maximum(t - 1, 0)] != group))
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(tiles.end_t[t] > tiles.start_t[t])
    def _() -> None:
        # Both sides: what lies outside may be a NaN, and 0 * NaN is one. In float32, since v5 has
        # no vector unit for bfloat16.
        x_md = jnp.where(_inside(tiles, t, x_ref.shape), _wide(x_ref[...]), 0)
        dy_mf = jnp.where(_inside(tiles, t, dy_ref.shape), _wide(dy_ref[...]), 0)
        dims = (((0,), (0,)), ((), ()))
        total_ref[...] += _dot(x_md.astype(x_ref.dtype), dy_mf.astype(dy_ref.dtype), dims)

    @pl.when((t == last) | (tiles.group_t[jnp.minimum(t + 1, last)] != group))
    def _() -> None:
        dw_ref[...] = total_ref[...].astype(dw_ref.dtype)


def _inside(tiles: Tiles, t: Any, shape: tuple[int, int]) -> Array:
    """Which rows of this visit's block are its group's, over all columns."""
    row_mn = tiles.block_t[t] * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row_mn >= tiles.start_t[t]) & (row_mn < tiles.end_t[t])


def _up_to(total: int, i: Any, a: Array, dim: int) -> Array:
    """The i-th block with zeros for what is beyond the end of a summed dim."""
    block = a.shape[dim]
    if total % block == 0:
        return a
    at = i * block + jax.lax.broadcasted_iota(jnp.int32, a.shape, dim)
    return jnp.where(at < total, _wide(a), 0).astype(a.dtype)


def _wide(a: Array) -> Array:
    return a.astype(jnp.float32)


def _dot(a: Array, b: Array, dims: Any) -> Array:
    return jax.lax.dot_general(
        a, b, dims, precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )


def _row_block(rows: int, e: int) -> int:
    """About a group's rows; a buffer smaller than that is one block."""
    return min(rows, MAX_ROWS, max(MIN_ROWS, pl.next_power_of_2(pl.cdiv(rows, e))))


def _summed_block(k: int, most: int) -> int:
    """Without a rest at the end of k, which costs a mask, if that takes at least half of `most`."""
    whole = [size for size in range(most, most // 2 - 1, -128) if k % size == 0]
    return min(k, whole[0] if whole else most)


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))
