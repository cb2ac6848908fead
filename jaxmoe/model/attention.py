"""Self-attention blocks: grouped-query (Ainslie et al., arXiv:2305.13245), multi-head at K = N and
multi-query at K = 1; and multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe import context, transfer
from jaxmoe.config import MlaConfig, ModelConfig
from jaxmoe.kernels.attention import causal_attention, checks_vma, context_attention, pick
from jaxmoe.kernels.low_precision import einsum
from jaxmoe.mesh import tokens
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.model.remat import QKV, named
from jaxmoe.model.rope import Turns, rope, score_scale
from jaxmoe.spec import Spec

Array = jax.Array


@struct.dataclass
class Places:
    """Where the tokens of a batch are; L in the order of context.py."""

    turns: Turns  # of RoPE; b = B, or 1 for the same positions in every row
    documents_BL: Array | None = None  # int32, 0 for padding; None: each row is one document


@struct.dataclass
class Attention:
    """What a config leaves out is None."""

    wq_DNH: Any
    wk_DKH: Any
    wv_DKH: Any
    wo_NHD: Any
    bq_NH: Any
    bk_KH: Any
    bv_KH: Any
    bo_D: Any
    q_norm: Any  # [H], or [N, H] over all heads at once
    k_norm: Any
    sinks_N: Any


@struct.dataclass
class Mla:
    wqa_DQ: Any  # None, and q_norm_Q too, where queries come from the input directly
    q_norm_Q: Any
    wq_QNH: Any  # Q = D then; a head's last W are the rotary part
    wkva_DJ: Any
    wkr_DW: Any
    kv_norm_J: Any
    wk_JNI: Any
    wv_JNU: Any
    wo_NUD: Any
    sinks_N: Any


def attention_specs(cfg: ModelConfig) -> Attention | Mla:
    return _grouped_specs(cfg) if cfg.mla is None else _mla_specs(cfg, cfg.mla)


def attention(
    params: Any, x_BLD: Array, places: Places, cfg: ModelConfig, window: int | None
) -> Array:
    """Causal self-attention. Parameters as gathered for compute; heads stay over `model`."""
    with jax.named_scope("qkv"):
        project = _grouped_qkv if cfg.mla is None else _mla_qkv
        q_BLNH, k, v = named(project(params, x_BLD, places, cfg), QKV)
    with jax.named_scope("attend"):
        scale = score_scale(cfg.rope, q_BLNH.shape[-1]) * transfer.attention_scale(cfg)
        cap = cfg.attention_soft_cap
        masked = places.documents_BL is not None
        path = pick(cfg.attention_path, q_BLNH, v, cap, documents=masked, sinks=cfg.attention_sinks)
        options = {"scale": scale, "window": window, "soft_cap": cap}
        if context.shards() > 1:
            attend = partial(context_attention, wish=cfg.context_attention, **options)
        else:
            attend = partial(causal_attention, path=path, **options)
        local = partial(_attend, attend)
        heads = tokens("model", None)
        inputs = (q_BLNH, k, v, places.documents_BL, params.sinks_N)
        specs = (heads, _kv_spec(k), _kv_spec(v), tokens(), P("model"))
        mapped = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=checks_vma(path))
        o_BLNU = mapped(*inputs)
    with jax.named_scope("out"):
        wo_NUD = params.wo_NHD if cfg.mla is None else params.wo_NUD
        y_BLD = einsum("BLNU,NUD->BLD", o_BLNU, wo_NUD, cfg.matmul, out_sharding=tokens(None))
        bias_D = getattr(params, "bo_D", None)
        return y_BLD if bias_D is None else y_BLD + bias_D[None, None]


def _attend(
    attend: Any, q_blnH: Array, k: Any, v_blkU: Array, documents_bl: Any, sinks_n: Any
) -> Array:
    """On one shard. MLA's keys come in two parts, of which the rotary one is for all heads."""
    if isinstance(k, tuple):
        k_blnI, k_bl1W = k
        k_blnW = jnp.broadcast_to(k_bl1W, (*k_blnI.shape[:3], k_bl1W.shape[-1]))
        k = jnp.concatenate([k_blnI, k_blnW], axis=-1)
    return attend(q_blnH, k, v_blkU, documents_bl, sinks_n)


def _kv_spec(x: Any) -> Any:
    """Heads over `model`; a single one is on all of its shards."""
    if isinstance(x, tuple):
        return tuple(_kv_spec(part) for part in x)
    return tokens("model" if x.shape[2] > 1 else None, None)


# Grouped-query


def _grouped_specs(cfg: ModelConfig) -> Attention:
    d, n, k, h = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    kv_heads = "heads" if k > 1 else "one_head"

    def into(heads: int, axis: str) -> Spec:
        return Spec(shape=(d, heads, h), axes=("embed", axis, "head"), inputs=("embed",))

    def bias(*shape: int, axes: tuple[str, ...]) -> Spec | None:
        return Spec(shape=shape, axes=axes, init="zeros") if cfg.attention_bias else None

    def norm(heads: int, axis: str) -> Spec | None:
        if cfg.qk_norm == "full":
            return Spec(shape=(heads, h), axes=(axis, "head"), init="ones", cast=False)
        return rms_norm_specs(h) if cfg.qk_norm == "per_head" else None

    return Attention(
        wq_DNH=into(n, "heads"),
        wk_DKH=into(k, kv_heads),
        wv_DKH=into(k, kv_heads),
        wo_NHD=Spec(
            shape=(n, h, d),
            axes=("heads", "head", "embed"),
            inputs=("heads", "head"),
            gain=transfer.residual_gain(cfg),
        ),
        bq_NH=bias(n, h, axes=("heads", "head")),
        bk_KH=bias(k, h, axes=(kv_heads, "head")),
        bv_KH=bias(k, h, axes=(kv_heads, "head")),
        bo_D=bias(d, axes=("norm",)),
        q_norm=norm(n, "heads"),
        k_norm=norm(k, kv_heads),
        sinks_N=_sinks_spec(cfg),
    )


def _grouped_qkv(
    params: Attention, x_BLD: Array, places: Places, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    q_BLNH = einsum("BLD,DNH->BLNH", x_BLD, params.wq_DNH, cfg.matmul)
    k_BLKH = einsum("BLD,DKH->BLKH", x_BLD, params.wk_DKH, cfg.matmul)
    v_BLKH = einsum("BLD,DKH->BLKH", x_BLD, params.wv_DKH, cfg.matmul)
    if cfg.attention_bias:
        q_BLNH += params.bq_NH[None, None]
        k_BLKH += params.bk_KH[None, None]
        v_BLKH += params.bv_KH[None, None]
    if cfg.qk_norm != "none":
        q_BLNH = rms_norm(params.q_norm, q_BLNH, cfg.norm_eps)
        k_BLKH = rms_norm(params.k_norm, k_BLKH, cfg.norm_eps)
    q_BLNH = rope(q_BLNH, places.turns)
    k_BLKH = rope(k_BLKH, places.turns)
    return q_BLNH, k_BLKH, v_BLKH


def _sinks_spec(cfg: ModelConfig) -> Spec | None:
    if not cfg.attention_sinks:
        return None
    return Spec(shape=(cfg.n_heads,), axes=("heads",), init="zeros", cast=False)


# Multi-head latent


def _mla_specs(cfg: ModelConfig, mla: MlaConfig) -> Mla:
    d, n, h = cfg.d_model, cfg.n_heads, mla.d_nope + mla.d_rope
    compressed = mla.q_rank > 0

    def make(width: int) -> Spec:
        return Spec(shape=(d, width), axes=("embed", "latent"), inputs=("embed",))

    def use(rank: int, width: int) -> Spec:
        axes = ("latent_in", "heads", "head")
        return Spec(shape=(rank, n, width), axes=axes, inputs=("latent_in",))

    return Mla(
        wqa_DQ=make(mla.q_rank) if compressed else None,
        q_norm_Q=rms_norm_specs(mla.q_rank) if compressed else None,
        wq_QNH=use(mla.q_rank or d, h),
        wkva_DJ=make(mla.kv_rank),
        wkr_DW=make(mla.d_rope),
        kv_norm_J=rms_norm_specs(mla.kv_rank),
        wk_JNI=use(mla.kv_rank, mla.d_nope),
        wv_JNU=use(mla.kv_rank, mla.d_value),
        wo_NUD=Spec(
            shape=(n, mla.d_value, d),
            axes=("heads", "head", "embed"),
            inputs=("heads", "head"),
            gain=transfer.residual_gain(cfg),
        ),
        sinks_N=_sinks_spec(cfg),
    )


def _mla_qkv(
    params: Mla, x_BLD: Array, places: Places, cfg: ModelConfig
) -> tuple[Array, tuple[Array, Array], Array]:
    assert cfg.mla is not None
    latent_BLQ = x_BLD
    if cfg.mla.q_rank:
        latent_BLQ = einsum("BLD,DQ->BLQ", x_BLD, params.wqa_DQ, cfg.matmul)
        latent_BLQ = rms_norm(params.q_norm_Q, latent_BLQ, cfg.norm_eps)
    q_BLNH = einsum("BLQ,QNH->BLNH", latent_BLQ, params.wq_QNH, cfg.matmul)
    q_BLNI, q_BLNW = jnp.split(q_BLNH, [cfg.mla.d_nope], axis=-1)
    q_BLNW = rope(q_BLNW, places.turns)
    q_BLNH = jnp.concatenate([q_BLNI, q_BLNW], axis=-1)

    latent_BLJ = einsum("BLD,DJ->BLJ", x_BLD, params.wkva_DJ, cfg.matmul)
    latent_BLJ = rms_norm(params.kv_norm_J, latent_BLJ, cfg.norm_eps)
    k_BLNI = einsum("BLJ,JNI->BLNI", latent_BLJ, params.wk_JNI, cfg.matmul)
    v_BLNU = einsum("BLJ,JNU->BLNU", latent_BLJ, params.wv_JNU, cfg.matmul)
    k_BL1W = einsum("BLD,DW->BLW", x_BLD, params.wkr_DW, cfg.matmul)[:, :, None]
    k_BL1W = rope(k_BL1W, places.turns)
    return q_BLNH, (k_BLNI, k_BL1W), v_BLNU
