"""Causal attention of a sequence that is spread over the `context` axis (context.py).

    ring    keys and values travel from device to device, and each adds what it sees of them to its
            own queries' softmax (ring attention, Liu et al., arXiv:2310.01889)
    gather  all keys and values come to each device

Both move the same bytes. The ring holds the keys of two devices at a time, hides its hops behind
the matmuls, and where a window is narrow visits the neighbours alone; gathering is one collective
instead of many, but holds the keys of the whole sequence and float32 gradients of them.

Inside of shard_map. The VJP is our own: it keeps a device's own queries, keys, values, outputs and
log-sum-exps; keys travel again in the backward pass, and their gradients with them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe import context
from jaxmoe.context import AXIS
from jaxmoe.kernels import online
from jaxmoe.kernels.chunked import Mask
from jaxmoe.kernels.online import Back, Keys, Queries, Sums

Array = jax.Array

# "auto" gathers up to this: the keys and values of all the sequences of a device, and their float32
# gradients. Below it the hops of a ring are too short to hide.
FEW_BYTES = 16 << 20


class Plan(NamedTuple):
    """Static: what is visited."""

    way: str  # ring or gather
    first: int  # the shard that a ring begins with, from the own one backwards
    rounds: int  # shards visited
    block: int  # positions of a block of `online`


def pick(
    wish: str, c: int, window: int | None, *, heads: tuple[int, int], length: int, bytes_: int
) -> str:
    """The way of a call; `wish` is `model.context_attention`.

    Args:
        c: shards of the sequence.
        heads: of queries, and of keys and values, on one device.
        length: of a shard.
        bytes_: of the keys and values of all shards and of their float32 gradients, on one device.
    """
    if wish != "auto":
        return wish
    if len(_visits(window, length, c)) < c:
        return "ring"  # of neighbours
    # With few enough heads the whole sequence's keys take no more than the shard's own queries.
    return "gather" if heads[1] * c <= heads[0] or bytes_ <= FEW_BYTES else "ring"


def ring_attention(
    q_ZGlH: Array,
    k_ZlH: Array,
    v_ZlU: Array,
    documents_Zl: Array | None = None,
    sinks_ZG: Array | None = None,
    *,
    way: str,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """o_ZGlU of this shard's queries over the keys of all shards, in the dtype of v.

    Args:
        q_ZGlH: queries of this shard, already scaled; l in the order of context.py.
        k_ZlH, v_ZlU, documents_Zl: of this shard; the rest as in `online.online_attention`.
        way: "ring" or "gather".
    """
    c, length = jax.lax.axis_size(AXIS), k_ZlH.shape[1]
    visits = _visits(window, length, c)
    plan = Plan(way, visits[0], len(visits), _block(length // 2))
    q_ZGlH = q_ZGlH.astype(k_ZlH.dtype)
    return _attend((Mask(window, soft_cap), plan), q_ZGlH, k_ZlH, v_ZlU, documents_Zl, sinks_ZG)


def _visits(window: int | None, length: int, c: int) -> range:
    """The shards that some of a shard's queries see, as steps back from the own one: blocks within
    a window's reach are held by shards within the same reach, on both sides."""
    if window is not None:
        reach = -(-(window - 1) // (length // 2))
        if 2 * reach + 1 < c:
            return range(-reach, reach + 1)
    return range(c)


def sends(way: str, window: int | None, length: int, c: int) -> tuple[int, int]:
    """How often a device sends as much as its own keys and values in one pass over those of all
    shards, and as much as their gradients on the way back.

    Args:
        length: of a shard.
    """
    if way == "gather":
        return c - 1, c - 1
    visits = _visits(window, length, c)
    hops, home = len(visits) - 1, visits[-1] % c != 0
    return hops + (visits[0] % c != 0), hops + home


def _block(length: int) -> int:
    """Positions of a block: the largest divisor of `length` that is no larger than usual, or the
    next one where that is small."""
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    usual = max(n for n in divisors if n <= online.BLOCK)
    if 8 * usual >= min(online.BLOCK, length):
        return usual
    return min(n for n in divisors if n > usual)


def _outputs(static: tuple[Mask, Plan], *inputs: Any) -> Array:
    return _forward(static, *inputs)[0]


def _forward(
    static: tuple[Mask, Plan],
    q_ZGlH: Array,
    k_ZlH: Array,
    v_ZlU: Array,
    documents_Zl: Array | None,
    sinks_ZG: Array | None,
) -> tuple[Array, Any]:
    mask, plan = static
    queries = Queries(q_ZGlH, documents_Zl, _starts(plan, k_ZlH, 0))

    def visit(sums: Sums, keys: Keys, _: None) -> tuple[Sums, None]:
        return online.look(mask, queries, keys, sums), None

    sums = online.nothing_seen(q_ZGlH, v_ZlU, sinks_ZG)
    sums, _ = _walk(plan, visit, sums, (k_ZlH, v_ZlU, documents_Zl), None)
    o_ZGlU, lse_ZGl = online.finish(sums, v_ZlU.dtype)
    return o_ZGlU, (q_ZGlH, k_ZlH, v_ZlU, documents_Zl, sinks_ZG, o_ZGlU, lse_ZGl)


def _backward(static: tuple[Mask, Plan], kept: Any, do_ZGlU: Array) -> tuple[Any, ...]:
    mask, plan = static
    q_ZGlH, k_ZlH, v_ZlU, documents_Zl, sinks_ZG, o_ZGlU, lse_ZGl = kept
    queries = Queries(q_ZGlH, documents_Zl, _starts(plan, k_ZlH, 0))
    back = Back(do_ZGlU, lse_ZGl, online.deltas(do_ZGlU, o_ZGlU))

    def visit(dq_ZGlH: Array, keys: Keys, sums: Any) -> tuple[Array, Any]:
        more_ZGlH, *sums = online.gradients(mask, queries, keys, back, *sums)
        return dq_ZGlH + more_ZGlH, tuple(sums)

    dq_ZGlH = jnp.zeros_like(q_ZGlH, jnp.float32)
    sums = (jnp.zeros_like(k_ZlH, jnp.float32), jnp.zeros_like(v_ZlU, jnp.float32))
    dq_ZGlH, (dk_ZlH, dv_ZlU) = _walk(plan, visit, dq_ZGlH, (k_ZlH, v_ZlU, documents_Zl), sums)
    return (
        dq_ZGlH.astype(q_ZGlH.dtype),
        dk_ZlH.astype(k_ZlH.dtype),
        dv_ZlU.astype(v_ZlU.dtype),
        None,
        online.gradient_of_sinks(sinks_ZG, back),
    )


_attend: Any = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _walk(plan: Plan, visit: Any, result: Any, held: Any, sums: Any) -> tuple[Any, Any]:
    """visit(result, keys, sums of keys) -> both anew, for the keys of every shard there is to see.

    Args:
        held: this shard's keys, values and documents.
        sums: zeros, of which each shard's travel with its keys; they come home.
    """
    if plan.way == "gather":
        keys = _keys(_gathered(held), _starts_of_all(plan, held[0]))
        result, sums = visit(result, keys, _wide(sums))
        return result, _scattered(sums)

    def at(result: Any, held: Any, sums: Any, step: Array | int) -> tuple[Any, Any]:
        keys = _keys(held, _starts(plan, held[0], plan.first + step))
        return visit(result, keys, sums)

    def one(carry: Any, step: Array) -> tuple[Any, None]:
        result, held, sums = carry
        following = _passed_on(held, 1)  # while these are looked at
        result, sums = at(result, held, sums, step)
        return (result, following, _passed_on(sums, 1)), None

    last = plan.rounds - 1
    begin = (result, _passed_on(held, plan.first), sums)
    (result, held, sums), _ = jax.lax.scan(one, begin, jnp.arange(last))
    result, sums = at(result, held, sums, last)
    return result, _passed_on(sums, -(plan.first + last))


def _keys(held: tuple[Array, Array, Array | None], starts_J: Array) -> Keys:
    k_ZPH, v_ZPU, documents_ZP = held
    return Keys(k_ZPH, v_ZPU, documents_ZP, starts_J)


def _passed_on(arrays: Any, steps: int) -> Any:
    """To the shard that many steps on."""
    c = jax.lax.axis_size(AXIS)
    if steps % c == 0:
        return arrays
    return jax.lax.ppermute(arrays, AXIS, [(i, (i + steps) % c) for i in range(c)])


def _starts(plan: Plan, k_ZlH: Array, back: Array | int) -> Array:
    """int32: where the blocks of a shard begin, rising; `back` steps before this one."""
    c, half = jax.lax.axis_size(AXIS), k_ZlH.shape[1] // 2
    shard = (jax.lax.axis_index(AXIS) - back) % c
    within = jnp.arange(0, half, plan.block, dtype=jnp.int32)
    return jnp.concatenate([first + within for first in context.block_starts(shard, c, half)])


# All shards at one time


def _starts_of_all(plan: Plan, k_ZlH: Array) -> Array:
    return jnp.arange(0, k_ZlH.shape[1] * jax.lax.axis_size(AXIS), plan.block, dtype=jnp.int32)


def _gathered(held: Any) -> Any:
    """[Z, l, ...] -> [Z, L, ...], in natural order."""
    c = jax.lax.axis_size(AXIS)

    def one(a: Array) -> Array:
        return context.straight(jax.lax.all_gather(a, AXIS, axis=1, tiled=True), 1, c)

    return jax.tree.map(one, held)


def _wide(sums: Any) -> Any:
    """Zeros for all shards."""
    c = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda a: jnp.concatenate([a] * c, axis=1), sums)


def _scattered(sums: Any) -> Any:
    """The transpose of `_gathered`."""
    c = jax.lax.axis_size(AXIS)

    def one(a: Array) -> Array:
        zigzag = context.zigzag(a, 1, c)
        return jax.lax.psum_scatter(zigzag, AXIS, scatter_dimension=1, tiled=True)

    return jax.tree.map(one, sums)
