"""Causal grouped-query attention, in chunks of queries."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array

# At least this many queries a chunk, and at most that many chunks, which are unrolled: a chunk sees
# only its visible keys, so nearly half of the scores are never computed. Measured on 2 CPU cores at
# L=256 (forward + backward): 13.9 ms against 26.8 ms in one piece.
CHUNK, MAX_CHUNKS = 64, 8


def causal_attention(q_BLNH: Array, k_BMKH: Array, v_BMKH: Array) -> Array:
    """Softmax attention of each position over itself and those before it; on one shard.

    Args:
        q_BLNH: queries; N is a multiple of K, and consecutive N / K heads share a key/value head.
        k_BMKH, v_BMKH: keys and values, M = L.

    Returns:
        o_BLNH in the dtype of v. Scores and softmax are float32.
    """
    b, length, n, h = q_BLNH.shape
    k = k_BMKH.shape[2]
    # One batch dim and two matrix dims: the only layout that XLA CPU hands to a fast matmul.
    q_ZGLH = jnp.moveaxis(q_BLNH, 1, 2).reshape(b * k, n // k, length, h)
    k_ZMH = jnp.moveaxis(k_BMKH, 1, 2).reshape(b * k, length, h)
    v_ZMH = jnp.moveaxis(v_BMKH, 1, 2).reshape(b * k, length, h)
    chunk = max(min(CHUNK, length), -(-length // MAX_CHUNKS))
    parts = [
        _attend(q_ZGLH[:, :, i : i + chunk], k_ZMH[:, : i + chunk], v_ZMH[:, : i + chunk], first=i)
        for i in range(0, length, chunk)
    ]
    o_ZGLH = jnp.concatenate(parts, axis=2)
    return jnp.moveaxis(o_ZGLH.reshape(b, n, length, h), 2, 1)


def _attend(q_ZGlH: Array, k_ZmH: Array, v_ZmH: Array, first: int) -> Array:
    """Queries at positions first, first + 1, ... over the keys from 0 on. Z = B * K."""
    z, g, l, h = q_ZGlH.shape  # noqa: E741
    m = k_ZmH.shape[1]
    q_ZqH = (q_ZGlH / math.sqrt(h)).astype(k_ZmH.dtype).reshape(z, g * l, h)
    scores_Zqm = jnp.einsum("ZqH,ZmH->Zqm", q_ZqH, k_ZmH, preferred_element_type=jnp.float32)
    visible_lm = first + jnp.arange(l)[:, None] >= jnp.arange(m)[None, :]
    scores_ZGlm = jnp.where(visible_lm[None, None], scores_Zqm.reshape(z, g, l, m), -1e30)
    probs_Zqm = jax.nn.softmax(scores_ZGlm, axis=-1).reshape(z, g * l, m).astype(v_ZmH.dtype)
    return jnp.einsum("Zqm,ZmH->ZqH", probs_Zqm, v_ZmH).reshape(z, g, l, h)
