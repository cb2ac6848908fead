"""A function of each group's parameters over that group's rows, a block of rows at a time.

The rows of a group lie together in a buffer, in one or more segments whose starts and lengths are
on the device; what is computed follows the lengths to within a block, whatever they are. Loops of
plain matmuls: the portable way, and the fast one on CPU, where a block keeps its hidden rows in
the cache (LOG.md, 2026-11-22). No collective may be in the function: trip counts differ by device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Pack = Callable[[Any], Any]


class Rowwise(NamedTuple):
    """A function that works on each row by itself, in two steps: between them are the hidden rows,
    which the backward pass computes again or finds kept."""

    # (packed parameters of one group, [r, D]) -> [r, X]; linear, or keeping saves nothing
    into: Callable[[Any, Array], Array]
    # (parameters, [r, X], weights [r]) -> [r, D]
    out: Callable[[Any, Array, Array], Array]


# Rows at a time, and at the ragged end of a segment, where half a block would be wasted on average.
# 4,096 tokens over 8 experts top-2 (width 256, ff 512), the same (128, 128) and 64 top-8 (256,
# 128): 126, 102 and 90 GFLOP/s at 128 rows, 134, 105 and 90 at 256, 122, 111 and 80 at 512
# (LOG.md).
BLOCK, TAIL = 256, 32


def as_it_is(own: Any) -> Any:
    return own


@jax.custom_vjp
def held(a: Array) -> Array:
    """`a`, whose gradient is computed once: XLA CPU would fuse it into each matmul that reads it,
    and compute it again for each (5 to 12 % of an expert's forward and backward; LOG.md)."""
    return a


held.defvjp(lambda a: (a, None), lambda _, da: (jax.lax.optimization_barrier(da),))


def grouped(
    f: Rowwise,
    w: Any,
    x_SD: Array,
    weights_S: Array,
    starts_eg: Array,
    lengths_eg: Array,
    pack: Pack = as_it_is,
    *,
    keep: bool = False,
) -> tuple[Array, Array | None]:
    """y_SD: f over the segments; and, if they are to be kept, the hidden rows [S, X]. Rows outside
    of the segments are undefined.

    Args:
        w: parameters, groups on the leading dim e of every leaf.
        x_SD, weights_S: rows, and a number for each.
        starts_eg, lengths_eg: int32 segments of each group, rising over (e, g).
        pack: linear; a group's parameters as f wants them, made once a group.
    """
    block = _block(len(x_SD), len(lengths_eg))
    # A last block may reach beyond its segment, and beyond the buffer: what it writes there belongs
    # to later segments, which overwrite it, or to none.
    x_sD, weights_s = _padded(x_SD, block), _padded(weights_S, block)

    def group(carry: Any, inputs: Any) -> tuple[Any, None]:
        own, starts_g, lengths_g = inputs
        packed = pack(own)

        def step(at: Array, _: Array, n: int, state: Any) -> Any:
            y_sD, kept_sX = state
            hidden_rX = f.into(packed, _rows(x_sD, at, n))
            y_rD = f.out(packed, hidden_rX, _rows(weights_s, at, n))
            kept_sX = _put(kept_sX, hidden_rX, at) if keep else None
            return _put(y_sD, y_rD, at), kept_sX

        return _walk(step, starts_g, lengths_g, block, carry), None

    begin = jnp.zeros_like(x_sD), _no_hidden(f, w, x_sD, pack) if keep else None
    (y_sD, kept_sX), _ = jax.lax.scan(group, begin, (w, starts_eg, lengths_eg))
    return y_sD[: len(x_SD)], None if kept_sX is None else kept_sX[: len(x_SD)]


def grouped_gradients(
    f: Rowwise,
    w: Any,
    x_SD: Array,
    weights_S: Array,
    starts_eg: Array,
    lengths_eg: Array,
    dy_SD: Array,
    pack: Pack = as_it_is,
    kept_SX: Array | None = None,
) -> tuple[Any, Array, Array]:
    """dw, dx_SD, dweights_S of `grouped`; hidden rows that were not kept are computed once more,
    block by block. Sums over rows are float32."""
    block = _block(len(x_SD), len(lengths_eg))
    x_sD, weights_s = _padded(x_SD, block), _padded(weights_S, block)
    dy_sD = _padded(dy_SD, block)
    kept_sX = None if kept_SX is None else _padded(kept_SX, block)

    def group(carry: Any, inputs: Any) -> tuple[Any, Any]:
        own, starts_g, lengths_g = inputs
        packed, unpack = jax.vjp(pack, own)

        def step(at: Array, end: Array, n: int, state: Any) -> Any:
            dw, dx_sD, dweights_s = state
            inside_r = at + jnp.arange(n) < end
            dy_rD = jnp.where(inside_r[:, None], _rows(dy_sD, at, n), 0)
            hidden_rX, pull_into = jax.vjp(f.into, packed, _rows(x_sD, at, n))
            if kept_sX is not None:
                hidden_rX = _rows(kept_sX, at, n)  # and nobody reads what `into` gives
            _, pull_out = jax.vjp(f.out, packed, hidden_rX, _rows(weights_s, at, n))
            dw_out, dhidden_rX, dweights_r = pull_out(dy_rD)
            dw_into, dx_rD = pull_into(dhidden_rX)
            dw_block = jax.tree.map(jnp.add, dw_into, dw_out)
            dw = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), dw, dw_block)
            return dw, _put(dx_sD, dx_rD, at), _put(dweights_s, dweights_r, at)

        zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), packed)
        dw, *carry = _walk(step, starts_g, lengths_g, block, (zeros, *carry))
        dw = jax.tree.map(lambda a, b: a.astype(b.dtype), dw, packed)
        return tuple(carry), unpack(dw)[0]

    begin = (jnp.zeros_like(x_sD), jnp.zeros_like(weights_s))
    (dx_sD, dweights_s), dw = jax.lax.scan(group, begin, (w, starts_eg, lengths_eg))
    return dw, dx_sD[: len(x_SD)], dweights_s[: len(x_SD)]


def _no_hidden(f: Rowwise, w: Any, x_sD: Array, pack: Pack) -> Array:
    first = jax.tree.map(lambda a: a[0], w)
    return jnp.zeros_like(jax.eval_shape(lambda w, x: f.into(pack(w), x), first, x_sD))


def _block(rows: int, groups: int) -> int:
    """Half of it where most of a group's rows would be in the tail."""
    return min(BLOCK if rows >= 2 * BLOCK * groups else BLOCK // 2, rows)


def _walk(step: Any, starts_g: Array, lengths_g: Array, block: int, state: Any) -> Any:
    """step(first row of a block, end of its segment, rows of the block, state) -> state, over a
    group's segments."""
    tail = min(TAIL, block)

    def segment(j: Any, state: Any) -> Any:
        start, length = starts_g[j], lengths_g[j]
        end, whole = start + length, length // block
        rest = start + whole * block

        def body(i: Array, state: Any) -> Any:
            return step(start + i * block, end, block, state)

        def at_end(i: Array, state: Any) -> Any:
            return step(rest + i * tail, end, tail, state)

        state = jax.lax.fori_loop(0, whole, body, state)
        return jax.lax.fori_loop(0, -((rest - end) // tail), at_end, state)

    n = len(starts_g)
    return segment(0, state) if n == 1 else jax.lax.fori_loop(0, n, segment, state)


def _padded(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


def _rows(a: Array, at: Array, n: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, at, n)


def _put(a: Array, rows: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, rows.astype(a.dtype), at, 0)
