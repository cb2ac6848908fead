"""Mixture-of-experts feed-forward: top-k router, dropless dispatch, SwiGLU experts.

In a step the rows of a shard go to slots [E, C, D], by all-to-all over the `expert` axis to the
devices that hold the experts, through the experts as batched matmuls, and back. C is picked at run
time among a few compiled sizes by the largest load anywhere, the last of which always suffices, so
no token is ever dropped and no shape depends on the data. The VJP is our own: it keeps the inputs
and switches again, since differentiating a switch would keep the residuals of every branch.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import dispatch
from jaxmoe.mesh import BATCH
from jaxmoe.spec import Spec

Array = jax.Array

# Sizes of the slots relative to a balanced load; one that always suffices is added. The most loaded
# expert of a layer had 1.30 times its share in the median and 1.55 at the 95th percentile
# (quickstart, learned router; LOG.md 2026-11-22). Each size costs compile time.
CAPACITY_FACTORS = (1.25, 1.5, 2.0)


@struct.dataclass
class Moe:
    router_DE: Any
    wgate_EDF: Any
    wup_EDF: Any
    wdown_EFD: Any


@struct.dataclass
class RouterStats:
    """What the router did to a batch, of one layer; reduced over the whole global batch."""

    load_E: Array  # share of the rows that went to each expert, times E: 1 is balanced
    load_balance: Array  # auxiliary loss, 1 is balanced
    router_z: Array  # mean of logsumexp^2 of the router's logits


def moe_specs(cfg: ModelConfig) -> Moe:
    d, e, f = cfg.d_model, cfg.n_experts, cfg.d_ff
    into = Spec(shape=(e, d, f), axes=("experts", "expert_embed", "ff"), inputs=("expert_embed",))
    return Moe(
        router_DE=Spec(shape=(d, e), axes=("embed", "router"), inputs=("embed",), cast=False),
        wgate_EDF=into,
        wup_EDF=into,
        wdown_EFD=Spec(
            shape=(e, f, d),
            axes=("experts", "ff", "expert_embed"),
            inputs=("ff",),
            gain=1 / math.sqrt(2 * cfg.n_layers),
        ),
    )


def moe(params: Moe, x_BLD: Array, cfg: ModelConfig) -> tuple[Array, RouterStats]:
    """The block's output and what the router did. Parameters as gathered for compute."""
    with jax.named_scope("router"):
        weights_BLA, ids_BLA, stats = route(params.router_DE, x_BLD, cfg)
    with jax.named_scope("experts"):
        y_BLD = _experts(
            cfg, x_BLD, weights_BLA, ids_BLA, (params.wgate_EDF, params.wup_EDF, params.wdown_EFD)
        )
    return y_BLD, stats


def route(router_DE: Array, x_BLD: Array, cfg: ModelConfig) -> tuple[Array, Array, RouterStats]:
    """Softmax router in float32; the weights of the top k are normalised to add up to one.

    Returns:
        weights_BLA float32, ids_BLA int32, and the stats. The load-balance loss is that of Switch
        Transformer (arXiv:2101.03961, eq. 4) over the global batch; the z-loss that of ST-MoE
        (arXiv:2202.08906, eq. 5).
    """
    logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD.astype(jnp.float32), router_DE)
    probs_BLE = jax.nn.softmax(logits_BLE, axis=-1)
    top_BLA, ids_BLA = jax.lax.top_k(probs_BLE, cfg.top_k)
    weights_BLA = top_BLA / top_BLA.sum(-1, keepdims=True)
    chosen_BLE = jax.nn.one_hot(ids_BLA, cfg.n_experts, dtype=jnp.float32).sum(-2)
    load_E = chosen_BLE.mean((0, 1)) * (cfg.n_experts / cfg.top_k)
    stats = RouterStats(
        load_E=load_E,
        load_balance=(load_E * probs_BLE.mean((0, 1))).sum(),
        router_z=(jax.nn.logsumexp(logits_BLE, axis=-1) ** 2).mean(),
    )
    return weights_BLA, ids_BLA.astype(jnp.int32), stats


Weights = tuple[Array, Array, Array]  # gate_EDF, up_EDF, down_EFD

_ROWS = P(BATCH, None, None)
_IN = P("expert", None, "model")
_WEIGHTS = (_IN, _IN, P("expert", "model", None))


def _apply_experts(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Weights
) -> Array:
    """sum_a weight_a * expert_a(x) for every token."""
    mapped: Any = jax.shard_map(
        partial(_switch, cfg, _forward_at),
        in_specs=(_ROWS, _ROWS, _ROWS, _WEIGHTS, ()),
        out_specs=_ROWS,
    )
    return mapped(x_BLD, weights_BLA, ids_BLA, w, ())


def _experts_fwd(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Weights
) -> tuple[Array, Any]:
    return _apply_experts(cfg, x_BLD, weights_BLA, ids_BLA, w), (x_BLD, weights_BLA, ids_BLA, w)


def _experts_bwd(cfg: ModelConfig, residuals: Any, dy_BLD: Array) -> tuple[Any, ...]:
    mapped: Any = jax.shard_map(
        partial(_switch, cfg, _backward_at),
        in_specs=(_ROWS, _ROWS, _ROWS, _WEIGHTS, _ROWS),
        out_specs=(_ROWS, _ROWS, _WEIGHTS),
    )
    dx_BLD, dweights_BLA, dw = mapped(*residuals, dy_BLD)
    return dx_BLD, dweights_BLA, None, dw


_experts: Any = jax.custom_vjp(_apply_experts, nondiff_argnums=(0,))
_experts.defvjp(_experts_fwd, _experts_bwd)


def _switch(
    cfg: ModelConfig, run: Any, x_blD: Array, weights: Array, ids: Array, w: Weights, ct: Any
) -> Any:
    """Runs the branch whose capacity suffices for the largest load of any shard."""
    x_tD = x_blD.reshape(-1, x_blD.shape[-1])
    weights_tA, ids_tA = weights.reshape(-1, cfg.top_k), ids.reshape(-1, cfg.top_k)
    choices = capacities(len(x_tD), cfg)
    # One answer for all devices: the branches hold collectives.
    largest = jax.lax.pmax(dispatch.expert_load(ids_tA, cfg.n_experts).max(), BATCH)
    index = (largest > jnp.array(choices[:-1], jnp.int32)).sum()
    branches = [partial(run, cfg, capacity) for capacity in choices]
    return jax.lax.switch(index, branches, x_blD, weights_tA, ids_tA, w, ct)


def capacities(tokens: int, cfg: ModelConfig) -> list[int]:
    """Compiled slot counts of an expert for a shard of `tokens`, rising; the last one always
    suffices, as a token's choices are different experts."""
    mean = tokens * cfg.top_k / cfg.n_experts
    sizes = {min(tokens, _round_up(math.ceil(factor * mean), 8)) for factor in CAPACITY_FACTORS}
    return sorted(sizes | {tokens})


def _forward_at(
    cfg: ModelConfig,
    capacity: int,
    x_blD: Array,
    weights_tA: Array,
    ids_tA: Array,
    w: Weights,
    _: Any,
) -> Array:
    plan = dispatch.make_plan(ids_tA, cfg.n_experts, capacity)
    return _run(capacity, x_blD, weights_tA, w, plan)


def _backward_at(
    cfg: ModelConfig,
    capacity: int,
    x_blD: Array,
    weights_tA: Array,
    ids_tA: Array,
    w: Weights,
    dy_blD: Array,
) -> Any:
    plan = dispatch.make_plan(ids_tA, cfg.n_experts, capacity)
    _, pull = jax.vjp(lambda x, u, v: _run(capacity, x, u, v, plan), x_blD, weights_tA, w)
    dx_blD, dweights_tA, dw = pull(dy_blD)
    return dx_blD, dweights_tA.reshape(*x_blD.shape[:2], -1), dw


def _run(capacity: int, x_blD: Array, weights_tA: Array, w: Weights, plan: dispatch.Plan) -> Array:
    """One shard's tokens through all experts, its own and those of its `expert` peers."""
    gate_eDf, up_eDf, down_efD = w
    # The same on all `model` shards, each of which gives a part of the gradient: the transpose of
    # the cast adds them up.
    x_blD, weights_tA = jax.lax.pcast((x_blD, weights_tA), "model", to="varying")
    x_tD = x_blD.reshape(-1, x_blD.shape[-1])
    x_SD = dispatch.to_slots(x_tD, plan)
    x_erD = _to_experts(x_SD, len(gate_eDf), capacity)
    hidden_erf = jax.nn.silu(jnp.einsum("erD,eDf->erf", x_erD, gate_eDf)) * jnp.einsum(
        "erD,eDf->erf", x_erD, up_eDf
    )
    y_erD = jnp.einsum("erf,efD->erD", hidden_erf, down_efD)
    y_SD = _from_experts(y_erD, capacity)
    y_tD = dispatch.from_slots(y_SD, weights_tA, plan)
    # Each `model` shard has summed over its part of F only. Added after the combine, so that a
    # token's row moves once instead of once a choice.
    return jax.lax.psum(y_tD, "model").reshape(x_blD.shape)


def _to_experts(x_SD: Array, e: int, capacity: int) -> Array:
    """[E * C, D] of this shard -> [e, shards * C, D]: all peers' rows for this device's experts."""
    x_geCD = x_SD.reshape(-1, e, capacity, x_SD.shape[-1])
    x_geCD = jax.lax.all_to_all(x_geCD, "expert", split_axis=0, concat_axis=0)
    return jnp.moveaxis(x_geCD, 0, 1).reshape(e, -1, x_SD.shape[-1])


def _from_experts(y_erD: Array, capacity: int) -> Array:
    """The way back of `_to_experts`."""
    e, _, d = y_erD.shape
    y_geCD = jnp.moveaxis(y_erD.reshape(e, -1, capacity, d), 1, 0)
    y_geCD = jax.lax.all_to_all(y_geCD, "expert", split_axis=0, concat_axis=0)
    return y_geCD.reshape(-1, d)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
