"""A function of each group's parameters over that group's rows, a block of rows at a time.

The rows of a group lie together in a buffer, in one or more segments whose starts and lengths are
on the device; what is computed follows the lengths to within a block, whatever they are. Loops of
plain matmuls: the portable way, and the fast one on CPU, where a block keeps its hidden rows in
the cache (LOG.md, 2026-11-22). No collective may be in the function: trip counts differ by device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
# (parameters of one group, rows [r, D], weights [r]) -> rows [r, D]
Rowwise = Callable[[Any, Array, Array], Array]

# Rows at a time: 4,096 tokens of width 256 over 8 and 64 experts ran within noise at 64, 128 and
# mixed sizes up to 512 (LOG.md).
BLOCK = 128


def grouped(
    f: Rowwise, w: Any, x_SD: Array, weights_S: Array, starts_eg: Array, lengths_eg: Array
) -> Array:
    """y_SD: f over the segments; rows outside of them are undefined.

    Args:
        f: works on each row by itself.
        w: parameters, groups on the leading dim e of every leaf.
        x_SD, weights_S: rows, and a number for each.
        starts_eg, lengths_eg: int32 segments of each group, rising over (e, g).
    """
    block = min(BLOCK, len(x_SD))
    # A last block may reach beyond its segment, and beyond the buffer: what it writes there belongs
    # to later segments, which overwrite it, or to none.
    x_sD, weights_s = _padded(x_SD, block), _padded(weights_S, block)

    def group(y_sD: Array, inputs: Any) -> tuple[Array, None]:
        own, starts_g, lengths_g = inputs

        def step(at: Array, _: Array, y_sD: Array) -> Array:
            rows = f(own, _rows(x_sD, at, block), _rows(weights_s, at, block))
            return _put(y_sD, rows, at)

        return _walk(step, starts_g, lengths_g, block, y_sD), None

    y_sD, _ = jax.lax.scan(group, jnp.zeros_like(x_sD), (w, starts_eg, lengths_eg))
    return y_sD[: len(x_SD)]


def grouped_gradients(
    f: Rowwise,
    w: Any,
    x_SD: Array,
    weights_S: Array,
    starts_eg: Array,
    lengths_eg: Array,
    dy_SD: Array,
) -> tuple[Any, Array, Array]:
    """dw, dx_SD, dweights_S of `grouped`; f is computed once more, block by block. Sums over rows
    are float32."""
    block = min(BLOCK, len(x_SD))
    x_sD, weights_s = _padded(x_SD, block), _padded(weights_S, block)
    dy_sD = _padded(dy_SD, block)

    def group(carry: Any, inputs: Any) -> tuple[Any, Any]:
        own, starts_g, lengths_g = inputs

        def step(at: Array, end: Array, state: Any) -> Any:
            dw, dx_sD, dweights_s = state
            inside_r = at + jnp.arange(block) < end
            dy_rD = jnp.where(inside_r[:, None], _rows(dy_sD, at, block), 0)
            _, pull = jax.vjp(f, own, _rows(x_sD, at, block), _rows(weights_s, at, block))
            dw_block, dx_rD, dweights_r = pull(dy_rD)
            dw = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), dw, dw_block)
            return dw, _put(dx_sD, dx_rD, at), _put(dweights_s, dweights_r, at)

        zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), own)
        dw, *carry = _walk(step, starts_g, lengths_g, block, (zeros, *carry))
        return tuple(carry), jax.tree.map(lambda a, b: a.astype(b.dtype), dw, own)

    begin = (jnp.zeros_like(x_sD), jnp.zeros_like(weights_s))
    (dx_sD, dweights_s), dw = jax.lax.scan(group, begin, (w, starts_eg, lengths_eg))
    return dw, dx_sD[: len(x_SD)], dweights_s[: len(x_SD)]


def _walk(step: Any, starts_g: Array, lengths_g: Array, block: int, state: Any) -> Any:
    """step(first row of a block, end of its segment, state) -> state, over a group's segments."""

    def segment(j: Any, state: Any) -> Any:
        start, length = starts_g[j], lengths_g[j]

        def body(i: Array, state: Any) -> Any:
            return step(start + i * block, start + length, state)

        return jax.lax.fori_loop(0, -(-length // block), body, state)

    n = len(starts_g)
    return segment(0, state) if n == 1 else jax.lax.fori_loop(0, n, segment, state)


def _padded(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


def _rows(a: Array, at: Array, n: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, at, n)


def _put(a: Array, rows: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, rows.astype(a.dtype), at, 0)
