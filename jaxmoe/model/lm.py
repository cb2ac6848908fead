"""The language model: embedding, a scan over equal layers, final norm, and the loss."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.cross_entropy import LossSums, cross_entropy
from jaxmoe.mesh import BATCH, gather
from jaxmoe.model.attention import Attention, attention, attention_specs
from jaxmoe.model.moe import Moe, RouterStats, moe, moe_specs
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.spec import Spec, stack

Array = jax.Array


@struct.dataclass
class Layer:
    attention_norm_D: Any
    attention: Attention
    moe_norm_D: Any
    moe: Moe


@struct.dataclass
class Lm:
    embed_VD: Any
    layers: Layer  # stacked on a leading dim R
    final_norm_D: Any
    head_DV: Any


def layer_specs(cfg: ModelConfig) -> Layer:
    return Layer(
        attention_norm_D=rms_norm_specs(cfg.d_model),
        attention=attention_specs(cfg),
        moe_norm_D=rms_norm_specs(cfg.d_model),
        moe=moe_specs(cfg),
    )


def lm_specs(cfg: ModelConfig) -> Lm:
    v, d = cfg.vocab_size, cfg.d_model
    return Lm(
        # Rows are looked up, not multiplied: unit variance enters the residual stream.
        embed_VD=Spec(shape=(v, d), axes=("vocab", "embed"), inputs=()),
        layers=stack(layer_specs(cfg), cfg.n_layers),
        final_norm_D=rms_norm_specs(d),
        head_DV=Spec(shape=(d, v), axes=("embed", "vocab"), inputs=("embed",)),
    )


def lm_loss(
    params: Lm, tokens_BL: Array, targets_BL: Array, weights_BL: Array, cfg: ModelConfig
) -> tuple[LossSums, RouterStats]:
    """Loss sums over the weighted positions, and router stats of every layer (leading dim R).

    `LossSums.total` has the auxiliary losses in it, per weighted token, so that total / weight is
    what the optimiser minimises.
    """
    x_BLD, stats = hidden(params, tokens_BL, cfg)
    head_DV = gather(params.head_DV, lm_specs(cfg).head_DV, jnp.dtype(cfg.dtype))
    with jax.named_scope("loss"):
        sums = cross_entropy(
            x_BLD, head_DV, targets_BL, weights_BL, chunk=cfg.loss_chunk, z_coef=cfg.z_loss_coef
        )
    auxiliary = (
        cfg.load_balance_coef * stats.load_balance.sum() + cfg.router_z_coef * stats.router_z.sum()
    )
    total = sums.total + auxiliary * sums.weight
    return dataclasses.replace(sums, total=total), stats


def hidden(params: Lm, tokens_BL: Array, cfg: ModelConfig) -> tuple[Array, RouterStats]:
    """Final normalised hidden states x_BLD in the compute dtype, and router stats by layer."""
    dtype = jnp.dtype(cfg.dtype)
    specs = lm_specs(cfg)
    embed_VD = gather(params.embed_VD, specs.embed_VD, dtype)
    with jax.named_scope("embed"):
        x_BLD = look_up(embed_VD, tokens_BL)
    body = partial(_layer, cfg=cfg, specs=layer_specs(cfg), dtype=dtype)
    x_BLD, stats = jax.lax.scan(body, x_BLD, params.layers)
    return rms_norm(params.final_norm_D, x_BLD, cfg.norm_eps), stats


def _layer(
    x_BLD: Array, params: Layer, *, cfg: ModelConfig, specs: Layer, dtype: jnp.dtype
) -> tuple[Array, RouterStats]:
    attend = partial(_attention_block, cfg=cfg, specs=specs, dtype=dtype)
    if cfg.remat == "full":
        attend = jax.checkpoint(attend)
    x_BLD = x_BLD + attend(x_BLD, params)
    # The experts keep only their inputs by themselves (moe.py), so they need no checkpoint.
    h_BLD = rms_norm(params.moe_norm_D, x_BLD, cfg.norm_eps)
    y_BLD, stats = moe(gather(params.moe, specs.moe, dtype), h_BLD, cfg)
    return x_BLD + y_BLD, stats


def _attention_block(
    x_BLD: Array, params: Layer, *, cfg: ModelConfig, specs: Layer, dtype: jnp.dtype
) -> Array:
    h_BLD = rms_norm(params.attention_norm_D, x_BLD, cfg.norm_eps)
    return attention(gather(params.attention, specs.attention, dtype), h_BLD, cfg)


def look_up(embed_VD: Array, tokens_BL: Array) -> Array:
    """Rows of a table whose V is sharded over `model`: each shard gives its own, the rest zeros."""

    def local(embed_vD: Array, tokens_bl: Array) -> Array:
        first = jax.lax.axis_index("model") * len(embed_vD)
        here = tokens_bl - first
        mine = (here >= 0) & (here < len(embed_vD))
        rows_blD = embed_vD.at[jnp.where(mine, here, 0)].get(mode="clip")
        return jax.lax.psum(jnp.where(mine[..., None], rows_blD, 0), "model")

    return jax.shard_map(
        local, in_specs=(P("model", None), P(BATCH, None)), out_specs=P(BATCH, None, None)
    )(embed_VD, tokens_BL)
