"""Grouped matmul as loops of plain matmuls over blocks of rows: any backend, the fast one on CPU.

A scan over the groups, so that a group's matrix is sliced out once, with a loop over its blocks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_tiles import bounds, precision_of

Array = jax.Array

# As kernels/grouped.py: 64 to 512 ran within noise of one another (LOG.md).
BLOCK = 128


def matmul_rows(x_SK: Array, w_EDF: Array, sizes_E: Array, *, transposed: bool) -> Array:
    """x @ w, or x @ w.T where `transposed`, by groups; zeros beyond the sum."""
    rows, dtype = len(x_SK), x_SK.dtype
    block = min(BLOCK, rows)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    starts_G, ends_G = bounds(sizes_E, rows)

    def group(y_SN: Array, inputs: Any) -> tuple[Array, None]:
        w_DF, start, end = inputs

        def step(i: Array, y_SN: Array) -> Array:
            at, inside_r1 = _block(start + i * block, end, rows, block)
            x_rK = jax.lax.dynamic_slice_in_dim(x_SK, at, block)
            old_rN = jax.lax.dynamic_slice_in_dim(y_SN, at, block)
            new_rN = _dot(x_rK, w_DF, dims).astype(dtype)
            new_rN = jnp.where(inside_r1, new_rN, old_rN)
            return jax.lax.dynamic_update_slice_in_dim(y_SN, new_rN, at, 0)

        return jax.lax.fori_loop(0, -(-(end - start) // block), step, y_SN), None

    y_SN = _zeros((rows, w_EDF.shape[1 if transposed else 2]), dtype, x_SK)
    return jax.lax.scan(group, y_SN, (w_EDF, starts_G[:-1], ends_G[:-1]))[0]


def matmul_weights(x_SD: Array, dy_SF: Array, sizes_E: Array) -> Array:
    """x.T @ dy of each group's rows, in the dtype of x; zeros for a group without rows."""
    rows, dtype = len(x_SD), x_SD.dtype
    block = min(BLOCK, rows)
    dims = (((0,), (0,)), ((), ()))
    starts_G, ends_G = bounds(sizes_E, rows)

    def group(_: None, inputs: Any) -> tuple[None, Array]:
        start, end = inputs

        def step(i: Array, dw_DF: Array) -> Array:
            at, inside_r1 = _block(start + i * block, end, rows, block)
            # Both sides: what lies outside may be a NaN, and 0 * NaN is one.
            x_rD = jnp.where(inside_r1, jax.lax.dynamic_slice_in_dim(x_SD, at, block), 0)
            dy_rF = jnp.where(inside_r1, jax.lax.dynamic_slice_in_dim(dy_SF, at, block), 0)
            return dw_DF + _dot(x_rD, dy_rF, dims)

        zeros_DF = _zeros((x_SD.shape[1], dy_SF.shape[1]), jnp.float32, x_SD)
        dw_DF = jax.lax.fori_loop(0, -(-(end - start) // block), step, zeros_DF)
        return None, dw_DF.astype(dtype)

    return jax.lax.scan(group, None, (starts_G[:-1], ends_G[:-1]))[1]


def swiglu_rows(x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array) -> Array:
    """silu(x @ wgate) * (x @ wup) by groups."""
    matmul = partial(matmul_rows, transposed=False)
    gate_SF, up_SF = matmul(x_SD, wgate_EDF, sizes_E), matmul(x_SD, wup_EDF, sizes_E)
    hidden_SF = jax.nn.silu(gate_SF.astype(jnp.float32)) * up_SF.astype(jnp.float32)
    return hidden_SF.astype(x_SD.dtype)


def _block(at: Array, end: Array, rows: int, block: int) -> tuple[Array, Array]:
    """Where the block is read that should begin at `at`, moved back into the buffer, and which of
    its rows are those from `at` up to `end`."""
    moved = jnp.minimum(at, rows - block)
    row_r = moved + jnp.arange(block, dtype=jnp.int32)
    return moved, ((row_r >= at) & (row_r < end))[:, None]


def _dot(a: Array, b: Array, dims: Any) -> Array:
    return jax.lax.dot_general(
        a, b, dims, precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that vary over the mesh axes that `like` varies over: the state of a loop must."""
    axes = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
