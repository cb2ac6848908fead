"""Experts over blocks of sorted rows (kernels/grouped.py): the portable way, and the one for CPU.

Only what an exchange has filled of its buffer is computed. The backward pass computes the hidden
rows again, block by block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.exchange import Exchange
from jaxmoe.kernels.grouped import grouped, grouped_gradients, held
from jaxmoe.kernels.low_precision import einsum
from jaxmoe.model.ffn import activate

Array = jax.Array


def compute(cfg: ModelConfig, sent: Exchange, w: Any, x_SD: Array, weights_S: Array) -> Array:
    """y_SD: this `model` shard's part of weight * expert(x), for the rows of the exchange."""
    f = partial(_one_expert, cfg)
    return grouped(f, w, x_SD, weights_S, sent.starts_eg, sent.lengths_eg, pack=_pack)


def gradients(
    cfg: ModelConfig, sent: Exchange, w: Any, x_SD: Array, weights_S: Array, dy_SD: Array
) -> tuple[Any, Array, Array]:
    """dw, dx_SD, dweights_S of `compute`."""
    f, segments = partial(_one_expert, cfg), (sent.starts_eg, sent.lengths_eg)
    return grouped_gradients(f, w, x_SD, weights_S, *segments, dy_SD, pack=_pack)


@struct.dataclass
class _Packed:
    """Gate and up side by side: one matmul of twice the width instead of two, 1.2 to 1.6 times as
    fast at F = 128 (LOG.md)."""

    winto_DX: Any  # X = 2 F
    wdown_FD: Any
    binto_X: Any
    bdown_D: Any


def _pack(w: Any) -> _Packed:
    """From `Experts` of one expert."""
    biased = w.bgate_EF is not None
    return _Packed(
        winto_DX=jnp.concatenate([w.wgate_EDF, w.wup_EDF], axis=1),
        wdown_FD=w.wdown_EFD,
        binto_X=jnp.concatenate([w.bgate_EF, w.bup_EF]) if biased else None,
        bdown_D=w.bdown_ED,
    )


def _one_expert(cfg: ModelConfig, w: _Packed, x_rD: Array, weights_r: Array) -> Array:
    """This `model` shard's part of weight * expert(x)."""
    into_rX = held(einsum("rD,DX->rX", x_rD, w.winto_DX, cfg.matmul))
    if w.binto_X is not None:
        into_rX += w.binto_X[None]
    gate_rf, up_rf = jnp.split(into_rX, 2, axis=1)
    hidden_rf = activate(gate_rf, up_rf, cfg).astype(jnp.float32) * weights_r[:, None]
    y_rD = einsum("rF,FD->rD", held(hidden_rf.astype(x_rD.dtype)), w.wdown_FD, cfg.matmul)
    if w.bdown_D is not None:
        first = jax.lax.axis_index("model") == 0
        bias_rD = jnp.where(first, w.bdown_D, 0)[None].astype(jnp.float32) * weights_r[:, None]
        y_rD += bias_rD.astype(y_rD.dtype)
    return y_rD
