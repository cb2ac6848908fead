"""Gated feed-forward of every token: dense layers and shared experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmoe import transfer
from jaxmoe.config import ModelConfig
from jaxmoe.kernels.low_precision import einsum
from jaxmoe.mesh import tokens
from jaxmoe.model.remat import HIDDEN, named
from jaxmoe.spec import Spec

Array = jax.Array


@struct.dataclass
class Ffn:
    wgate_DF: Any
    wup_DF: Any
    wdown_FD: Any


def ffn_specs(cfg: ModelConfig, width: int) -> Ffn:
    into = Spec(shape=(cfg.d_model, width), axes=("embed", "ff"), inputs=("embed",))
    return Ffn(
        wgate_DF=into,
        wup_DF=into,
        wdown_FD=Spec(
            shape=(width, cfg.d_model),
            axes=("ff", "embed"),
            inputs=("ff",),
            gain=transfer.residual_gain(cfg),
        ),
    )


def ffn(params: Ffn, x_BLD: Array, cfg: ModelConfig) -> Array:
    """Parameters as gathered for compute; F stays over `model`."""
    gate_BLf = einsum("BLD,DF->BLF", x_BLD, params.wgate_DF, cfg.matmul)
    up_BLf = einsum("BLD,DF->BLF", x_BLD, params.wup_DF, cfg.matmul)
    gate_BLf, up_BLf = named((gate_BLf, up_BLf), HIDDEN)
    hidden_BLf = activate(gate_BLf, up_BLf, cfg)
    out = tokens(None)
    return einsum("BLF,FD->BLD", hidden_BLf, params.wdown_FD, cfg.matmul, out_sharding=out)


def activate(gate: Array, up: Array, cfg: ModelConfig) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202); clamped, with a steeper gate and one added to `up`, in
    gpt-oss (arXiv:2508.10925, section 2.1)."""
    if cfg.activation == "swiglu":
        return jax.nn.silu(gate) * up
    limit = cfg.swiglu_limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(cfg.swiglu_alpha * gate) * (up + 1)
