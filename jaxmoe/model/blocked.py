"""Experts over blocks of sorted rows (kernels/grouped.py): compute follows the loads.

On one expert shard the rows are sorted and nothing is padded. Over several, rows travel in slots of
a static size as in moe.py, with their counts, and only the filled part of the slots is computed.
Forward and backward are written out: the backward pass computes the hidden rows again, block by
block, and needs no output rows, since the combine weights are applied before the last matmul.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import dispatch
from jaxmoe.kernels.grouped import grouped, grouped_gradients
from jaxmoe.mesh import BATCH
from jaxmoe.model.ffn import activate

Array = jax.Array
# Mesh axes over which an expert's rows are spread, but not its weights.
ROW_AXES = tuple(axis for axis in BATCH if axis != "expert")


def forward(
    cfg: ModelConfig,
    capacity: int | None,
    x_blD: Array,
    weights_tA: Array,
    ids_tA: Array,
    w: Any,
    _: Any,
) -> Array:
    """One shard's output; capacity: slots of an expert, None on a single expert shard."""
    sent = _Sent(cfg, capacity, ids_tA)
    x_SD, weights_S = sent.rows(x_blD), sent.weights(weights_tA)
    w, x_SD, weights_S = _varying(w, x_SD, weights_S)
    y_SD = grouped(partial(_one_expert, cfg), w, x_SD, weights_S, *sent.segments)
    y_tD = dispatch.sum_of_slots(sent.back(y_SD), sent.plan)
    return jax.lax.psum(y_tD, "model").reshape(x_blD.shape)


def backward(
    cfg: ModelConfig,
    capacity: int | None,
    x_blD: Array,
    weights_tA: Array,
    ids_tA: Array,
    w: Any,
    dy_blD: Array,
) -> tuple[Array, Array, Any]:
    """Gradients of x, the combine weights and the experts' parameters."""
    sent = _Sent(cfg, capacity, ids_tA)
    x_SD, weights_S, dy_SD = sent.rows(x_blD), sent.weights(weights_tA), sent.rows(dy_blD)
    w, x_SD, weights_S, dy_SD = _varying(w, x_SD, weights_S, dy_SD)
    dw, dx_SD, dweights_S = grouped_gradients(
        partial(_one_expert, cfg), w, x_SD, weights_S, *sent.segments, dy_SD
    )
    dx_tD = dispatch.sum_of_slots(sent.back(dx_SD), sent.plan)
    dweights_tA = dispatch.take(sent.back(dweights_S), sent.plan.slot_tA)
    # Each `model` shard has its part of F, each shard of the batch its rows.
    dx_tD, dweights_tA = jax.lax.psum((dx_tD, dweights_tA), "model")
    dw = jax.lax.psum(dw, ROW_AXES)
    shape = x_blD.shape
    # The down bias is on all `model` shards, and only the first one's counts.
    if dw.bdown_ED is not None:
        dw = dw.replace(bdown_ED=jax.lax.psum(dw.bdown_ED, "model"))
    return dx_tD.reshape(shape), dweights_tA.reshape(*shape[:2], -1), dw


class _Sent:
    """Where this shard's choices go, and which segments of what arrives are whose."""

    def __init__(self, cfg: ModelConfig, capacity: int | None, ids_tA: Array) -> None:
        self._capacity = capacity
        load_E = dispatch.expert_load(ids_tA, cfg.n_experts)
        if capacity is None:
            self.plan = dispatch.make_sorted_plan(ids_tA, cfg.n_experts)
            starts_E = jnp.cumsum(load_E) - load_E
            self.segments = starts_E[:, None], load_E[:, None]
            return
        self.plan = dispatch.make_plan(ids_tA, cfg.n_experts, capacity)
        lengths_ge = load_E.reshape(jax.lax.axis_size("expert"), -1)
        lengths_eg = jax.lax.all_to_all(lengths_ge, "expert", split_axis=0, concat_axis=0).T
        starts = jnp.arange(lengths_eg.size, dtype=jnp.int32) * capacity
        self.segments = starts.reshape(lengths_eg.shape), lengths_eg

    def rows(self, x_blD: Array) -> Array:
        """[S, D] on this device: every row that its experts get, from all of its `expert` peers."""
        x_tD = x_blD.reshape(-1, x_blD.shape[-1])
        return self._there(dispatch.take(x_tD, self.plan.token_S))

    def weights(self, weights_tA: Array) -> Array:
        return self._there(dispatch.take(weights_tA.reshape(-1), self.plan.choice_S))

    def _there(self, a: Array) -> Array:
        if self._capacity is None:
            return a
        return dispatch.to_experts(a, self._capacity).reshape(-1, *a.shape[1:])

    def back(self, a: Array) -> Array:
        """The way back of what `rows` and `weights` gave."""
        if self._capacity is None:
            return a
        e = len(self.segments[0])
        return dispatch.from_experts(a.reshape(e, -1, *a.shape[1:]), self._capacity)


def _one_expert(cfg: ModelConfig, w: Any, x_rD: Array, weights_r: Array) -> Array:
    """This `model` shard's part of weight * expert(x)."""
    gate_rf, up_rf = x_rD @ w.wgate_EDF, x_rD @ w.wup_EDF
    if w.bgate_EF is not None:
        gate_rf, up_rf = gate_rf + w.bgate_EF[None], up_rf + w.bup_EF[None]
    hidden_rf = activate(gate_rf, up_rf, cfg).astype(jnp.float32) * weights_r[:, None]
    y_rD = hidden_rf.astype(x_rD.dtype) @ w.wdown_EFD
    if w.bdown_ED is not None:
        first = jax.lax.axis_index("model") == 0
        bias_rD = jnp.where(first, w.bdown_ED, 0)[None].astype(jnp.float32) * weights_r[:, None]
        y_rD += bias_rD.astype(y_rD.dtype)
    return y_rD


def _varying(w: Any, *rows: Array) -> tuple[Any, ...]:
    """Marked as different on all devices of the batch and `model` axes: else the transpose of an
    implicit cast would put a collective into the loops."""
    bias = w.bdown_ED
    w = jax.lax.pcast(w.replace(bdown_ED=None), ROW_AXES, to="varying")
    if bias is not None:
        w = w.replace(bdown_ED=jax.lax.pcast(bias, (*ROW_AXES, "model"), to="varying"))
    return w, *jax.lax.pcast(rows, "model", to="varying")
