"""Which rows of which group each program of a grouped kernel works on; sizes are on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Tiles(NamedTuple):
    """int32, one entry for each step of a static grid."""

    group_t: Array  # E for the rows beyond all groups
    block_t: Array  # first row (`row_tiles`) or index of an aligned block of rows (`visits`)
    start_t: Array  # rows start <= r < end of that block are the group's
    end_t: Array


def row_tiles(sizes_E: Array, rows: int, block: int) -> Tiles:
    """Tiles of `block` rows that begin where a group begins: no tile holds two groups.

    The rows beyond the sum are one more group. A group of n rows has ceil(n / block) tiles, at most
    (n - 1) / block + 1: with E + 1 of them floor(rows / block) + E + 1 in all. Steps left over have
    no rows.
    """
    starts_G, ends_G = bounds(sizes_E, rows)
    counts_G = -(-(ends_G - starts_G) // block)
    group_t, rank_t, live_t = _spread(counts_G, rows // block + len(counts_G))
    start_t = jnp.where(live_t, starts_G[group_t] + rank_t * block, 0)
    end_t = jnp.where(live_t, ends_G[group_t], 0)
    return Tiles(group_t, start_t, start_t, end_t)


def visits(sizes_E: Array, rows: int, block: int, *, empty: bool) -> Tiles:
    """Aligned blocks of rows, each once for every group that has rows in it.

    In order of rows and of groups at once, so that visits of one block follow one another, as do
    those of one group. Between neighbouring groups at most one block is shared:
    ceil(rows / block) + E visits. Steps left over visit the last block again, for no rows.

    Args:
        empty: groups without rows get a visit too, and the rows beyond the sum none; otherwise the
            other way round.
    """
    starts_G, ends_G = bounds(sizes_E, rows)
    if empty:
        starts_G, ends_G = starts_G[:-1], ends_G[:-1]
    first_G = starts_G // block
    counts_G = jnp.where(ends_G > starts_G, -(-ends_G // block) - first_G, int(empty))
    blocks = -(-rows // block)
    group_t, rank_t, live_t = _spread(counts_G, blocks + len(sizes_E))
    block_t = jnp.minimum(first_G[group_t] + rank_t, blocks - 1)
    end_t = jnp.where(live_t, ends_G[group_t], 0)
    return Tiles(group_t, block_t, starts_G[group_t], end_t)


def bounds(sizes_E: Array, rows: int) -> tuple[Array, Array]:
    """int32 starts and ends of the E groups, and of the rows beyond them."""
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    starts_G = jnp.pad(ends_E, (1, 0))
    return starts_G, jnp.pad(ends_E, (0, 1), constant_values=rows)


def _spread(counts_G: Array, n: int) -> tuple[Array, Array, Array]:
    """Of each of n steps: its group, its rank in the group, and whether it is one at all; those
    left over go on counting in the last group."""
    cum_G = jnp.cumsum(counts_G, dtype=jnp.int32)
    step_t = jnp.arange(n, dtype=jnp.int32)
    # One fused comparison; a binary search would be a loop of launches on GPU.
    group_t = (step_t[:, None] >= cum_G[None, :]).sum(-1, dtype=jnp.int32)
    group_t = jnp.minimum(group_t, len(counts_G) - 1)
    return group_t, step_t - (cum_G - counts_G)[group_t], step_t < cum_G[-1]


def out_shape(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """A kernel's output that varies over the mesh axes that `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Float32 inputs are multiplied as float32: the default is TF32 on GPU, bfloat16 on TPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
