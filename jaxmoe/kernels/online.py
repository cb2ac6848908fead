"""Causal attention in blocks of queries and keys whose scores are never all there at one time:
memory grows with the length, not with its square.

An online softmax (Milakov and Gimelshein, arXiv:1805.02867) forward; backward the scores are
computed again, block by block, from the kept outputs and log-sum-exps (FlashAttention-2,
arXiv:2307.08691, section 3.1). Loops of plain matmuls for any backend.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.kernels.chunked import HIDDEN, KEPT, Mask

Array = jax.Array

# Queries, and keys, at a time. On 2 busy CPU cores (B=1 N=8 K=4 H=64, float32, forward + backward,
# L=4096) 0.85 s at 64, 1.2 s at 128, 0.91 s at 256 and 1.4 s at 512; accelerators want large ones.
BLOCK = 256


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
    z, g, length, _ = q_ZGPH.shape

    def queries(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_ZqH = _rows(q_ZGPH, i, 2).reshape(z, g * BLOCK, -1)

        def keys(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            o_ZqU, top_Zq, total_Zq = state
            scores_Zqm, visible_Zqm = _scores(mask, q_ZqH, k_ZPH, documents_ZP, i, j)
            scores_Zqm = jnp.where(visible_Zqm, scores_Zqm, HIDDEN)
            higher_Zq = jnp.maximum(top_Zq, scores_Zqm.max(-1))
            # A row that has seen nothing yet sums ones; its first real score shrinks them to 0.
            powers_Zqm = jnp.exp(scores_Zqm - higher_Zq[..., None])
            shrink_Zq = jnp.exp(top_Zq - higher_Zq)
            total_Zq = total_Zq * shrink_Zq + powers_Zqm.sum(-1)
            new_ZqU = _matmul("Zqm,ZmU->ZqU", powers_Zqm, _rows(v_ZPU, j, 1))
            return o_ZqU * shrink_Zq[..., None] + new_ZqU, higher_Zq, total_Zq

        o_ZqU = jnp.zeros_like(q_ZqH, jnp.float32, shape=(z, g * BLOCK, v_ZPU.shape[2]))
        if sinks_ZG is None:
            total_Zq = jnp.zeros_like(o_ZqU[..., 0])
            top_Zq = total_Zq + HIDDEN
        else:  # a score seen before all others, whose value is zero
            top_Zq = jnp.repeat(sinks_ZG.astype(jnp.float32), BLOCK, axis=1)
            total_Zq = jnp.ones_like(top_Zq)
        begin = (o_ZqU, top_Zq, total_Zq)
        o_ZqU, top_Zq, total_Zq = jax.lax.fori_loop(_first(mask, i), i + 1, keys, begin)
        o_ZGlU = (o_ZqU / total_Zq[..., None]).astype(v_ZPU.dtype).reshape(z, g, BLOCK, -1)
        return None, (o_ZGlU, (top_Zq + jnp.log(total_Zq)).reshape(z, g, BLOCK))

    _, (o_iZGlU, lse_iZGl) = jax.lax.scan(queries, None, jnp.arange(length // BLOCK))
    o_ZGPU = checkpoint_name(jnp.moveaxis(o_iZGlU, 0, 2).reshape(z, g, length, -1), KEPT)
    lse_ZGP = checkpoint_name(jnp.moveaxis(lse_iZGl, 0, 2).reshape(z, g, length), KEPT)
    return o_ZGPU, (q_ZGPH, k_ZPH, v_ZPU, documents_ZP, sinks_ZG, o_ZGPU, lse_ZGP)


def _backward(mask: Mask, kept: Any, do_ZGPU: Array) -> tuple[Any, ...]:
    q_ZGPH, k_ZPH, v_ZPU, documents_ZP, sinks_ZG, o_ZGPU, lse_ZGP = kept
    z, g, length, _ = q_ZGPH.shape
    # The softmax's gradient takes off each row's mean of dp, which is that of do * o.
    delta_ZGP = (do_ZGPU.astype(jnp.float32) * o_ZGPU.astype(jnp.float32)).sum(-1)

    def queries(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_ZqH = _rows(q_ZGPH, i, 2).reshape(z, g * BLOCK, -1)
        do_ZqU = _rows(do_ZGPU, i, 2).reshape(z, g * BLOCK, -1)
        lse_Zq, delta_Zq = (_rows(a, i, 2).reshape(z, -1) for a in (lse_ZGP, delta_ZGP))

        def keys(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_ZqH, dk_ZPH, dv_ZPU = state
            scores_Zqm, visible_Zqm = _scores(mask, q_ZqH, k_ZPH, documents_ZP, i, j)
            probs_Zqm = jnp.where(visible_Zqm, jnp.exp(scores_Zqm - lse_Zq[..., None]), 0)
            dprobs_Zqm = _matmul("ZqU,ZmU->Zqm", do_ZqU, _rows(v_ZPU, j, 1))
            dscores_Zqm = probs_Zqm * (dprobs_Zqm - delta_Zq[..., None])
            if mask.soft_cap is not None:
                dscores_Zqm *= 1 - (scores_Zqm / mask.soft_cap) ** 2
            dv_ZPU = _add(dv_ZPU, _matmul("Zqm,ZqU->ZmU", probs_Zqm, do_ZqU), j)
            dk_ZPH = _add(dk_ZPH, _matmul("Zqm,ZqH->ZmH", dscores_Zqm, q_ZqH), j)
            dq_ZqH += _matmul("Zqm,ZmH->ZqH", dscores_Zqm, _rows(k_ZPH, j, 1))
            return dq_ZqH, dk_ZPH, dv_ZPU

        begin = (jnp.zeros_like(q_ZqH, jnp.float32), *carry)
        dq_ZqH, *sums = jax.lax.fori_loop(_first(mask, i), i + 1, keys, begin)
        return tuple(sums), dq_ZqH.reshape(z, g, BLOCK, -1).astype(q_ZGPH.dtype)

    begin = (jnp.zeros_like(k_ZPH, jnp.float32), jnp.zeros_like(v_ZPU, jnp.float32))
    (dk_ZPH, dv_ZPU), dq_iZGlH = jax.lax.scan(queries, begin, jnp.arange(length // BLOCK))
    dq_ZGPH = jnp.moveaxis(dq_iZGlH, 0, 2).reshape(q_ZGPH.shape)
    dsinks_ZG = None
    if sinks_ZG is not None:  # its value is zero, so that only the mean of dp is left
        probs_ZGP = jnp.exp(sinks_ZG.astype(jnp.float32)[..., None] - lse_ZGP)
        dsinks_ZG = -(probs_ZGP * delta_ZGP).sum(-1).astype(sinks_ZG.dtype)
    return dq_ZGPH, dk_ZPH.astype(k_ZPH.dtype), dv_ZPU.astype(v_ZPU.dtype), None, dsinks_ZG


_attend: Any = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _scores(
    mask: Mask, q_ZqH: Array, k_ZPH: Array, documents_ZP: Any, i: Array, j: Array
) -> tuple[Array, Array]:
    """Capped scores of query block i with key block j, and which of them are seen (bool, [Z or 1,
    q, m], q = (group, position))."""
    groups = q_ZqH.shape[1] // BLOCK
    scores_Zqm = _matmul("ZqH,ZmH->Zqm", q_ZqH, _rows(k_ZPH, j, 1))
    if mask.soft_cap is not None:
        scores_Zqm = mask.soft_cap * jnp.tanh(scores_Zqm / mask.soft_cap)
    at_m = jnp.arange(BLOCK)
    distance_lm = (i - j) * BLOCK + at_m[:, None] - at_m[None, :]
    visible_lm = distance_lm >= 0
    if mask.window is not None:
        visible_lm &= distance_lm < mask.window
    visible_Zlm = visible_lm[None]
    if documents_ZP is not None:
        own_Zl, other_Zm = _rows(documents_ZP, i, 1), _rows(documents_ZP, j, 1)
        visible_Zlm = visible_Zlm & (own_Zl[:, :, None] == other_Zm[:, None, :])
    return scores_Zqm, jnp.tile(visible_Zlm, (1, groups, 1))


def _first(mask: Mask, i: Array) -> Array:
    """The first block of keys that query block i sees."""
    if mask.window is None:
        return jnp.zeros_like(i)
    return jnp.maximum(0, i * BLOCK - mask.window + 1) // BLOCK


def _matmul(equation: str, a: Array, b: Array) -> Array:
    """Computed weights are rounded to the dtype of what they weigh; sums are float32."""
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _rows(a: Array, i: Array, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK, axis)


def _add(a_ZPH: Array, rows_ZmH: Array, j: Array) -> Array:
    rows_ZmH += _rows(a_ZPH, j, 1)
    return jax.lax.dynamic_update_slice_in_dim(a_ZPH, rows_ZmH, j * BLOCK, 1)


def _padded(a: Array, axis: int, rows: int) -> Array:
    return jnp.pad(a, [(0, rows if dim == axis else 0) for dim in range(a.ndim)])
