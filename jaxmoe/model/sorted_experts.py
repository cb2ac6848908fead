"""Experts as matmuls of sorted rows (kernels/grouped_matmul.py): the way for GPU and TPU."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.exchange import Exchange
from jaxmoe.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, pick
from jaxmoe.model.ffn import activate

Array = jax.Array


def compute(
    cfg: ModelConfig, sent: Exchange, w: Any, x_SD: Array, weights_S: Array, *, keep: bool
) -> tuple[Array, Any]:
    """y_SD: this `model` shard's part of weight * expert(x), for the rows of the exchange; and
    their gate_Sf and up_Sf, if they are to be kept."""
    sizes_e = sent.lengths_eg.sum(1)
    rows_SD, own_S = sent.pack(x_SD), sent.pack(weights_S)
    if not keep:
        return sent.unpack(_ffn(cfg, w, rows_SD, own_S, sizes_e)), None
    gate_Sf, up_Sf = _into(w, rows_SD, sizes_e)
    y_SD = _out(w, activate(gate_Sf, up_Sf, cfg), own_S, sizes_e)
    return sent.unpack(y_SD), (gate_Sf, up_Sf)


def gradients(
    cfg: ModelConfig,
    sent: Exchange,
    w: Any,
    x_SD: Array,
    weights_S: Array,
    dy_SD: Array,
    kept: Any,
) -> tuple[Any, Array, Array]:
    """dw, dx_SD, dweights_S of `compute`; hidden rows that were not kept are computed again."""
    sizes_e = sent.lengths_eg.sum(1)
    rows_SD, own_S, dy_SD = sent.pack(x_SD), sent.pack(weights_S), sent.pack(dy_SD)
    if kept is None:
        _, pull = jax.vjp(lambda w, x, u: _ffn(cfg, w, x, u, sizes_e), w, rows_SD, own_S)
        dw, dx_SD, dweights_S = pull(dy_SD)
    else:
        _, pull_into = jax.vjp(lambda w, x: _into(w, x, sizes_e), w, rows_SD)
        out = lambda w, gate, up, u: _out(w, activate(gate, up, cfg), u, sizes_e)  # noqa: E731
        _, pull_out = jax.vjp(out, w, *kept, own_S)
        dw_out, *dkept, dweights_S = pull_out(dy_SD)
        dw_into, dx_SD = pull_into(tuple(dkept))
        dw = jax.tree.map(jnp.add, dw_into, dw_out)
    return dw, sent.unpack(dx_SD), sent.unpack(dweights_S)


def _ffn(cfg: ModelConfig, w: Any, x_SD: Array, weights_S: Array, sizes_e: Array) -> Array:
    if cfg.activation == "swiglu" and w.bgate_EF is None:
        hidden_Sf = grouped_swiglu(x_SD, w.wgate_EDF, w.wup_EDF, sizes_e, path=pick())
    else:
        hidden_Sf = activate(*_into(w, x_SD, sizes_e), cfg)
    return _out(w, hidden_Sf, weights_S, sizes_e)


def _into(w: Any, x_SD: Array, sizes_e: Array) -> tuple[Array, Array]:
    gate_Sf = grouped_matmul(x_SD, w.wgate_EDF, sizes_e, path=pick())
    up_Sf = grouped_matmul(x_SD, w.wup_EDF, sizes_e, path=pick())
    if w.bgate_EF is not None:
        gate_Sf += _of_its_expert(w.bgate_EF, len(x_SD), sizes_e)
        up_Sf += _of_its_expert(w.bup_EF, len(x_SD), sizes_e)
    return gate_Sf, up_Sf


def _out(w: Any, hidden_Sf: Array, weights_S: Array, sizes_e: Array) -> Array:
    # The combine weights here, and not on the output: so the backward pass needs no output rows.
    weighted_Sf = (hidden_Sf.astype(jnp.float32) * weights_S[:, None]).astype(hidden_Sf.dtype)
    y_SD = grouped_matmul(weighted_Sf, w.wdown_EFD, sizes_e, path=pick())
    if w.bdown_ED is not None:
        # Once, though all `model` shards have it and are added up.
        first = jax.lax.axis_index("model") == 0
        bias_SD = _of_its_expert(jnp.where(first, w.bdown_ED, 0), len(y_SD), sizes_e)
        y_SD += (bias_SD.astype(jnp.float32) * weights_S[:, None]).astype(y_SD.dtype)
    return y_SD


def _of_its_expert(bias_eX: Array, rows: int, sizes_e: Array) -> Array:
    """[rows, X]: the bias of each row's expert. A product with ones and zeros, whose transpose is
    one too: that of an indexing would scatter."""
    ends_e = jnp.cumsum(sizes_e)
    at_S1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    mine_Se = (at_S1 < ends_e[None]) & (at_S1 >= (ends_e - sizes_e)[None])
    return mine_Se.astype(bias_eX.dtype) @ bias_eX
