"""Causal attention in blocks of queries and keys whose scores are never all there at one time:
memory grows with the length, not with its square.

An online softmax (Milakov and Gimelshein, arXiv:1805.02867) forward; backward the scores are
computed again, block by block, from the kept outputs and log-sum-exps (FlashAttention-2,
arXiv:2307.08691, section 3.1). Loops of plain matmuls for any backend. Positions of a block follow
each other, but where each block lies is free: `look` and `gradients` also serve the shards of a
sequence (kernels/ring.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.kernels.chunked import HIDDEN, KEPT, Mask

Array = jax.Array

# Queries, and keys, at a time. On 2 busy CPU cores (B=1 N=8 K=4 H=64, float32, forward + backward,
# L=4096) 0.85 s at 64, 1.2 s at 128, 0.91 s at 256 and 1.4 s at 512; accelerators want large ones.
BLOCK = 256


class Queries(NamedTuple):
    """P positions in I blocks."""

    q_ZGPH: Array
    documents_ZP: Array | None
    starts_I: Array  # int32: the first position of each block

    @property
    def block(self) -> int:
        return self.q_ZGPH.shape[2] // len(self.starts_I)


class Keys(NamedTuple):
    """P positions in J blocks."""

    k_ZPH: Array
    v_ZPU: Array
    documents_ZP: Array | None
    starts_J: Array  # int32, rising: the first position of each block

    @property
    def block(self) -> int:
        return self.k_ZPH.shape[1] // len(self.starts_J)


class Sums(NamedTuple):
    """Of the softmax over the keys seen so far; float32."""

    o_ZGPU: Array  # of values times exp(score - top)
    top_ZGP: Array  # the highest score
    total_ZGP: Array  # of exp(score - top)


def online_attention(
    q_ZGLH: Array,
    k_ZLH: Array,
    v_ZLU: Array,
    documents_ZL: Array | None = None,
    sinks_ZG: Array | None = None,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """o_ZGLU in the dtype of v. Scores, softmax and sums over blocks are float32.

    Args:
        q_ZGLH: queries, already scaled; Z = B * K, and G heads share their keys and values.
        k_ZLH, v_ZLU: keys and values; U may differ from H.
        documents_ZL, sinks_ZG, window, soft_cap: as in `kernels.attention.causal_attention`.
    """
    length = q_ZGLH.shape[2]
    # Keys of the padding lie after all queries, hence are seen by none.
    pad = partial(_padded, rows=-length % BLOCK)
    documents = None if documents_ZL is None else pad(documents_ZL, axis=1)
    q, k, v = pad(q_ZGLH.astype(k_ZLH.dtype), axis=2), pad(k_ZLH, axis=1), pad(v_ZLU, axis=1)
    return _attend(Mask(window, soft_cap), q, k, v, documents, sinks_ZG)[:, :, :length]


def _outputs(
    mask: Mask, q_ZGPH: Array, k_ZPH: Array, v_ZPU: Array, documents_ZP: Any, sinks_ZG: Any
) -> Array:
    """P is the length, padded to whole blocks."""
    return _forward(mask, q_ZGPH, k_ZPH, v_ZPU, documents_ZP, sinks_ZG)[0]


def _forward(
    mask: Mask, q_ZGPH: Array, k_ZPH: Array, v_ZPU: Array, documents_ZP: Any, sinks_ZG: Any
) -> tuple[Array, Any]:
    queries, keys = _in_order(q_ZGPH, k_ZPH, v_ZPU, documents_ZP)
    sums = look(mask, queries, keys, nothing_seen(q_ZGPH, v_ZPU, sinks_ZG))
    o_ZGPU, lse_ZGP = finish(sums, v_ZPU.dtype)
    return o_ZGPU, (q_ZGPH, k_ZPH, v_ZPU, documents_ZP, sinks_ZG, o_ZGPU, lse_ZGP)


def _backward(mask: Mask, kept: Any, do_ZGPU: Array) -> tuple[Any, ...]:
    q_ZGPH, k_ZPH, v_ZPU, documents_ZP, sinks_ZG, o_ZGPU, lse_ZGP = kept
    queries, keys = _in_order(q_ZGPH, k_ZPH, v_ZPU, documents_ZP)
    back = Back(do_ZGPU, lse_ZGP, deltas(do_ZGPU, o_ZGPU))
    begin = (jnp.zeros_like(k_ZPH, jnp.float32), jnp.zeros_like(v_ZPU, jnp.float32))
    dq_ZGPH, dk_ZPH, dv_ZPU = gradients(mask, queries, keys, back, *begin)
    return (
        dq_ZGPH.astype(q_ZGPH.dtype),
        dk_ZPH.astype(k_ZPH.dtype),
        dv_ZPU.astype(v_ZPU.dtype),
        None,
        gradient_of_sinks(sinks_ZG, back),
    )


_attend: Any = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _in_order(q_ZGPH: Array, k_ZPH: Array, v_ZPU: Array, documents_ZP: Any) -> tuple[Queries, Keys]:
    starts_I = jnp.arange(0, k_ZPH.shape[1], BLOCK, dtype=jnp.int32)
    return Queries(q_ZGPH, documents_ZP, starts_I), Keys(k_ZPH, v_ZPU, documents_ZP, starts_I)


# Forward


def nothing_seen(q_ZGPH: Array, v_ZPU: Array, sinks_ZG: Array | None) -> Sums:
    """But the sinks."""
    o_ZGPU = jnp.zeros_like(q_ZGPH, jnp.float32, shape=(*q_ZGPH.shape[:3], v_ZPU.shape[2]))
    zeros_ZGP = jnp.zeros_like(o_ZGPU[..., 0])
    if sinks_ZG is None:
        return Sums(o_ZGPU, zeros_ZGP + HIDDEN, zeros_ZGP)
    # A score seen before all others, whose value is zero.
    return Sums(o_ZGPU, zeros_ZGP + sinks_ZG.astype(jnp.float32)[..., None], zeros_ZGP + 1)


def look(mask: Mask, queries: Queries, keys: Keys, sums: Sums) -> Sums:
    """The sums over these keys too."""
    block = queries.block

    def one(_: None, i: Array) -> tuple[None, list[Array]]:
        q_ZqH = _merged(_rows(queries.q_ZGPH, i, 2, block))

        def further(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            o_ZqU, top_Zq, total_Zq = state
            scores_Zqm, visible_zqm = _scores(mask, q_ZqH, queries, keys, i, j)
            scores_Zqm = jnp.where(visible_zqm, scores_Zqm, HIDDEN)
            higher_Zq = jnp.maximum(top_Zq, scores_Zqm.max(-1))
            # A row that has seen nothing yet sums ones; its first real score shrinks them to 0.
            powers_Zqm = jnp.exp(scores_Zqm - higher_Zq[..., None])
            shrink_Zq = jnp.exp(top_Zq - higher_Zq)
            total_Zq = total_Zq * shrink_Zq + powers_Zqm.sum(-1)
            new_ZqU = _matmul("Zqm,ZmU->ZqU", powers_Zqm, _rows(keys.v_ZPU, j, 1, keys.block))
            return o_ZqU * shrink_Zq[..., None] + new_ZqU, higher_Zq, total_Zq

        begin = tuple(_merged(_rows(a, i, 2, block)) for a in sums)
        state = jax.lax.fori_loop(*_seen(mask, queries, keys, i), further, begin)
        return None, [_split(a, block) for a in state]

    _, found = jax.lax.scan(one, None, jnp.arange(len(queries.starts_I)))
    return Sums(*(_joined(a) for a in found))


def finish(sums: Sums, dtype: Any) -> tuple[Array, Array]:
    """Outputs and log-sum-exps, named for rematerialisation."""
    o_ZGPU = (sums.o_ZGPU / sums.total_ZGP[..., None]).astype(dtype)
    lse_ZGP = sums.top_ZGP + jnp.log(sums.total_ZGP)
    return checkpoint_name(o_ZGPU, KEPT), checkpoint_name(lse_ZGP, KEPT)


# Backward


class Back(NamedTuple):
    """What the backward pass knows of the queries."""

    do_ZGPU: Array
    lse_ZGP: Array
    delta_ZGP: Array


def deltas(do_ZGPU: Array, o_ZGPU: Array) -> Array:
    """The softmax's gradient takes off each row's mean of dp, which is that of do * o."""
    return (do_ZGPU.astype(jnp.float32) * o_ZGPU.astype(jnp.float32)).sum(-1)


def gradients(
    mask: Mask, queries: Queries, keys: Keys, back: Back, dk_ZPH: Array, dv_ZPU: Array
) -> tuple[Array, Array, Array]:
    """float32 dq_ZGPH of these keys alone; dk_ZPH and dv_ZPU with what these queries add."""
    block = queries.block

    def one(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_ZqH = _merged(_rows(queries.q_ZGPH, i, 2, block))
        do_ZqU, lse_Zq, delta_Zq = (_merged(_rows(a, i, 2, block)) for a in back)

        def further(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_ZqH, dk_ZPH, dv_ZPU = state
            k_ZmH, v_ZmU = (_rows(a, j, 1, keys.block) for a in (keys.k_ZPH, keys.v_ZPU))
            scores_Zqm, visible_zqm = _scores(mask, q_ZqH, queries, keys, i, j)
            probs_Zqm = jnp.where(visible_zqm, jnp.exp(scores_Zqm - lse_Zq[..., None]), 0)
            dprobs_Zqm = _matmul("ZqU,ZmU->Zqm", do_ZqU, v_ZmU)
            dscores_Zqm = probs_Zqm * (dprobs_Zqm - delta_Zq[..., None])
            if mask.soft_cap is not None:
                dscores_Zqm *= 1 - (scores_Zqm / mask.soft_cap) ** 2
            dv_ZPU = _add(dv_ZPU, _matmul("Zqm,ZqU->ZmU", probs_Zqm, do_ZqU), j)
            dk_ZPH = _add(dk_ZPH, _matmul("Zqm,ZqH->ZmH", dscores_Zqm, q_ZqH), j)
            dq_ZqH += _matmul("Zqm,ZmH->ZqH", dscores_Zqm, k_ZmH)
            return dq_ZqH, dk_ZPH, dv_ZPU

        begin = (jnp.zeros_like(q_ZqH, jnp.float32), *carry)
        dq_ZqH, *sums = jax.lax.fori_loop(*_seen(mask, queries, keys, i), further, begin)
        return tuple(sums), _split(dq_ZqH, block)

    n = len(queries.starts_I)
    (dk_ZPH, dv_ZPU), dq_iZGlH = jax.lax.scan(one, (dk_ZPH, dv_ZPU), jnp.arange(n))
    return _joined(dq_iZGlH), dk_ZPH, dv_ZPU


def gradient_of_sinks(sinks_ZG: Array | None, back: Back) -> Array | None:
    """A sink's value is zero, so that only the mean of dp is left."""
    if sinks_ZG is None:
        return None
    probs_ZGP = jnp.exp(sinks_ZG.astype(jnp.float32)[..., None] - back.lse_ZGP)
    return -(probs_ZGP * back.delta_ZGP).sum(-1).astype(sinks_ZG.dtype)


# Blocks


def _seen(mask: Mask, queries: Queries, keys: Keys, i: Array) -> tuple[Array, Array]:
    """The first block of keys that query block i sees, and the one after the last."""
    start = queries.starts_I[i]
    stop = (keys.starts_J < start + queries.block).sum(dtype=jnp.int32)
    if mask.window is None:
        return jnp.zeros_like(stop), stop
    return (keys.starts_J + keys.block <= start - mask.window + 1).sum(dtype=jnp.int32), stop


def _scores(
    mask: Mask, q_ZqH: Array, queries: Queries, keys: Keys, i: Array, j: Array
) -> tuple[Array, Array]:
    """Capped scores of query block i with key block j, q = (group, position); and which of them are
    seen: bool, z = 1 or Z."""
    groups = queries.q_ZGPH.shape[1]
    scores_Zqm = _matmul("ZqH,ZmH->Zqm", q_ZqH, _rows(keys.k_ZPH, j, 1, keys.block))
    if mask.soft_cap is not None:
        scores_Zqm = mask.soft_cap * jnp.tanh(scores_Zqm / mask.soft_cap)
    at_l, at_m = jnp.arange(queries.block), jnp.arange(keys.block)
    apart = queries.starts_I[i] - keys.starts_J[j]
    distance_lm = apart + at_l[:, None] - at_m[None, :]
    visible_lm = distance_lm >= 0
    if mask.window is not None:
        visible_lm &= distance_lm < mask.window
    visible_zlm = visible_lm[None]
    if queries.documents_ZP is not None:
        own_Zl = _rows(queries.documents_ZP, i, 1, queries.block)
        other_Zm = _rows(keys.documents_ZP, j, 1, keys.block)
        visible_zlm = visible_zlm & (own_Zl[:, :, None] == other_Zm[:, None, :])
    return scores_Zqm, jnp.tile(visible_zlm, (1, groups, 1))


def _matmul(equation: str, a: Array, b: Array) -> Array:
    """Computed weights are rounded to the dtype of what they weigh; sums are float32."""
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _rows(a: Any, i: Array, axis: int, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)


def _add(a_ZPH: Array, rows_ZmH: Array, j: Array) -> Array:
    block = rows_ZmH.shape[1]
    rows_ZmH += _rows(a_ZPH, j, 1, block)
    return jax.lax.dynamic_update_slice_in_dim(a_ZPH, rows_ZmH, j * block, 1)


def _merged(a: Array) -> Array:
    """[Z, G, l, ...] -> [Z, q, ...], q = (group, position)."""
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def _split(a: Array, block: int) -> Array:
    """The way back of `_merged`."""
    return a.reshape(a.shape[0], -1, block, *a.shape[2:])


def _joined(a: Array) -> Array:
    """[I, Z, G, l, ...] -> [Z, G, P, ...]: the blocks one after another."""
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def _padded(a: Array, axis: int, rows: int) -> Array:
    return jnp.pad(a, [(0, rows if dim == axis else 0) for dim in range(a.ndim)])
