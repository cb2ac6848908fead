"""Grouped-query attention block (Ainslie et al., arXiv:2305.13245) with QK-norm."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.attention import causal_attention
from jaxmoe.mesh import BATCH
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.model.rope import rope
from jaxmoe.spec import Spec

Array = jax.Array


@struct.dataclass
class Attention:
    wq_DNH: Any
    wk_DKH: Any
    wv_DKH: Any
    wo_NHD: Any
    q_norm_H: Any  # None without QK-norm
    k_norm_H: Any


def attention_specs(cfg: ModelConfig) -> Attention:
    d, n, k, h = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    norm = rms_norm_specs(h) if cfg.qk_norm else None
    into = ("embed", "heads", "head")
    return Attention(
        wq_DNH=Spec(shape=(d, n, h), axes=into, inputs=("embed",)),
        wk_DKH=Spec(shape=(d, k, h), axes=into, inputs=("embed",)),
        wv_DKH=Spec(shape=(d, k, h), axes=into, inputs=("embed",)),
        wo_NHD=Spec(
            shape=(n, h, d),
            axes=("heads", "head", "embed"),
            inputs=("heads", "head"),
            gain=1 / math.sqrt(2 * cfg.n_layers),  # GPT-2, section 2.3: residual branches add up
        ),
        q_norm_H=norm,
        k_norm_H=norm,
    )


def attention(params: Attention, x_BLD: Array, cfg: ModelConfig) -> Array:
    """Causal self-attention. Parameters as gathered for compute; heads stay over `model`."""
    with jax.named_scope("qkv"):
        q_BLNH = jnp.einsum("BLD,DNH->BLNH", x_BLD, params.wq_DNH)
        k_BLKH = jnp.einsum("BLD,DKH->BLKH", x_BLD, params.wk_DKH)
        v_BLKH = jnp.einsum("BLD,DKH->BLKH", x_BLD, params.wv_DKH)
        if cfg.qk_norm:
            q_BLNH = rms_norm(params.q_norm_H, q_BLNH, cfg.norm_eps)
            k_BLKH = rms_norm(params.k_norm_H, k_BLKH, cfg.norm_eps)
        positions_L = jnp.arange(x_BLD.shape[1])
        q_BLNH = rope(q_BLNH, positions_L, cfg.rope_theta)
        k_BLKH = rope(k_BLKH, positions_L, cfg.rope_theta)
    with jax.named_scope("attend"):
        heads = P(BATCH, None, "model")
        o_BLNH = jax.shard_map(causal_attention, in_specs=(heads,) * 3, out_specs=heads)(
            q_BLNH, k_BLKH, v_BLKH
        )
    with jax.named_scope("out"):
        return jnp.einsum("BLNH,NHD->BLD", o_BLNH, params.wo_NHD, out_sharding=P(BATCH, None, None))
