"""Causal grouped-query attention."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def causal_attention(q_BLKGH: Array, k_BMKH: Array, v_BMKH: Array) -> Array:
    """Softmax attention of each position over itself and those before it.

    Args:
        q_BLKGH: queries; G query heads share each of the K key/value heads.
        k_BMKH, v_BMKH: keys and values, M = L.

    Returns:
        o_BLKGH in the dtype of v. The softmax is float32.
    """
    length, head = q_BLKGH.shape[1], q_BLKGH.shape[-1]
    scores_BKGLM = jnp.einsum(
        "BLKGH,BMKH->BKGLM", q_BLKGH, k_BMKH, preferred_element_type=jnp.float32
    )
    visible_LM = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    scores_BKGLM = jnp.where(visible_LM[None, None, None], scores_BKGLM / math.sqrt(head), -1e30)
    probs_BKGLM = jax.nn.softmax(scores_BKGLM, axis=-1).astype(v_BMKH.dtype)
    return jnp.einsum("BKGLM,BMKH->BLKGH", probs_BKGLM, v_BMKH)
