"""How the positions of a sequence are spread over the `context` axis: in a zigzag.

A sequence is cut into 2 c blocks for c shards, and shard i holds the blocks i and 2 c - 1 - i, so
that under a causal mask every shard has the same work (as in the training of Llama 3,
arXiv:2407.21783, section 3.3.2). Integer arrays come in natural order and are spread at the top of
the model; nothing has to be put back but what is returned by position.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.mesh import ways

Array = jax.Array
AXIS = "context"


def shards() -> int:
    return ways((AXIS,))


def spread(a_BL: Array) -> Array:
    """[B, L, ...] in natural order, with all of L on each device -> in a zigzag over `context`.

    L is a multiple of twice the shards.
    """
    spec = jax.typeof(a_BL).sharding.spec
    return jax.reshard(zigzag(a_BL, 1, shards()), P(spec[0], AXIS, *spec[2:]))


def collected(a_BL: Array) -> Array:
    """The way back of `spread`: natural order, all of L on each device of `context`."""
    spec = jax.typeof(a_BL).sharding.spec
    return straight(jax.reshard(a_BL, P(spec[0], None, *spec[2:])), 1, shards())


def zigzag(a: Array, dim: int, c: int) -> Array:
    """Blocks of `dim` in the order 0, 2 c - 1, 1, 2 c - 2, ..."""
    return _reordered(a, dim, [block for i in range(c) for block in (i, 2 * c - 1 - i)])


def straight(a: Array, dim: int, c: int) -> Array:
    """The way back of `zigzag`."""
    return _reordered(a, dim, [*range(0, 2 * c, 2), *range(2 * c - 1, 0, -2)])


def block_starts(shard: Array | int, c: int, length: int) -> tuple[Array | int, Array | int]:
    """The first positions of both blocks of a shard; `length` is that of a block."""
    return shard * length, (2 * c - 1 - shard) * length


def _reordered(a: Array, dim: int, blocks: list[int]) -> Array:
    if len(blocks) == 2:
        return a
    parts = jnp.split(a, len(blocks), axis=dim)
    return jnp.concatenate([parts[block] for block in blocks], axis=dim)
