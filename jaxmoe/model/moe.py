"""Mixture-of-experts feed-forward: top-k router, dropless dispatch, gated and shared experts.

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
from jaxmoe.model import blocked
from jaxmoe.model.ffn import activate, ffn, ffn_specs
from jaxmoe.model.remat import rematerialised
from jaxmoe.model.router import Router, RouterStats, route, router_specs
from jaxmoe.spec import Spec

Array = jax.Array

# Sizes of the slots relative to a balanced load; one that always suffices is added. The most loaded
# expert of a layer had 1.30 times its share in the median and 1.55 at the 95th percentile
# (quickstart, learned router; LOG.md 2026-11-22). Each size costs compile time.
CAPACITY_FACTORS = (1.25, 1.5, 2.0)


@struct.dataclass
class Experts:
    """Biases are None where the config has none."""

    wgate_EDF: Any
    wup_EDF: Any
    wdown_EFD: Any
    bgate_EF: Any
    bup_EF: Any
    bdown_ED: Any


@struct.dataclass
class Moe:
    router: Router
    experts: Experts
    shared: Any  # an Ffn that all tokens go through; None without


def moe_specs(cfg: ModelConfig) -> Moe:
    d, e, f = cfg.d_model, cfg.n_experts, cfg.d_ff
    into = Spec(shape=(e, d, f), axes=("experts", "expert_embed", "ff"), inputs=("expert_embed",))

    def bias(width: int, axis: str) -> Spec | None:
        spec = Spec(shape=(e, width), axes=("experts", axis), init="zeros")
        return spec if cfg.expert_bias else None

    experts = Experts(
        wgate_EDF=into,
        wup_EDF=into,
        wdown_EFD=Spec(
            shape=(e, f, d),
            axes=("experts", "ff", "expert_embed"),
            inputs=("ff",),
            gain=1 / math.sqrt(2 * cfg.n_layers),
        ),
        bgate_EF=bias(f, "ff"),
        bup_EF=bias(f, "ff"),
        bdown_ED=bias(d, "norm"),
    )
    shared = ffn_specs(cfg, cfg.n_shared_experts * f) if cfg.n_shared_experts else None
    return Moe(router=router_specs(cfg), experts=experts, shared=shared)


def moe(
    params: Moe,
    x_BLD: Array,
    cfg: ModelConfig,
    valid_BL: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, RouterStats]:
    """The block's output and what the router did. Parameters as gathered for compute."""
    with jax.named_scope("router"):
        weights_BLA, ids_BLA, stats = route(params.router, x_BLD, cfg, valid_BL, key)
    with jax.named_scope("experts"):
        y_BLD = _experts(cfg, x_BLD, weights_BLA, ids_BLA, params.experts)
    if params.shared is not None:
        with jax.named_scope("shared_experts"):
            y_BLD += rematerialised(partial(ffn, cfg=cfg), cfg)(params.shared, x_BLD)
    return y_BLD, stats


_ROWS = P(BATCH, None, None)
_IN = P("expert", None, "model")
_WEIGHTS = Experts(
    wgate_EDF=_IN,
    wup_EDF=_IN,
    wdown_EFD=P("expert", "model", None),
    bgate_EF=P("expert", "model"),
    bup_EF=P("expert", "model"),
    bdown_ED=P("expert", None),
)


def _apply_experts(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Experts
) -> Array:
    """sum_a weight_a * expert_a(x) for every token."""
    mapped: Any = jax.shard_map(
        partial(_switch, cfg, _path(cfg)[0]),
        in_specs=(_ROWS, _ROWS, _ROWS, _WEIGHTS, ()),
        out_specs=_ROWS,
    )
    return mapped(x_BLD, weights_BLA, ids_BLA, w, ())


def _experts_fwd(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Experts
) -> tuple[Array, Any]:
    return _apply_experts(cfg, x_BLD, weights_BLA, ids_BLA, w), (x_BLD, weights_BLA, ids_BLA, w)


def _experts_bwd(cfg: ModelConfig, residuals: Any, dy_BLD: Array) -> tuple[Any, ...]:
    mapped: Any = jax.shard_map(
        partial(_switch, cfg, _path(cfg)[1]),
        in_specs=(_ROWS, _ROWS, _ROWS, _WEIGHTS, _ROWS),
        out_specs=(_ROWS, _ROWS, _WEIGHTS),
    )
    dx_BLD, dweights_BLA, dw = mapped(*residuals, dy_BLD)
    return dx_BLD, dweights_BLA, None, dw


_experts: Any = jax.custom_vjp(_apply_experts, nondiff_argnums=(0,))
_experts.defvjp(_experts_fwd, _experts_bwd)


def _path(cfg: ModelConfig) -> tuple[Any, Any]:
    """Forward and backward at a capacity, by `expert_path`."""
    on_cpu = jax.default_backend() == "cpu"
    if cfg.expert_path == "blocked" or (cfg.expert_path == "auto" and on_cpu):
        return blocked.forward, blocked.backward
    return _forward_at, _backward_at


def _switch(
    cfg: ModelConfig, run: Any, x_blD: Array, weights: Array, ids: Array, w: Experts, ct: Any
) -> Any:
    """Runs the branch whose capacity suffices for the largest load of any shard."""
    x_tD = x_blD.reshape(-1, x_blD.shape[-1])
    weights_tA, ids_tA = weights.reshape(-1, cfg.top_k), ids.reshape(-1, cfg.top_k)
    if run in (blocked.forward, blocked.backward) and jax.lax.axis_size("expert") == 1:
        return run(cfg, None, x_blD, weights_tA, ids_tA, w, ct)  # nothing travels
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
    w: Experts,
    _: Any,
) -> Array:
    plan = dispatch.make_plan(ids_tA, cfg.n_experts, capacity)
    return _run(cfg, capacity, x_blD, weights_tA, w, plan)


def _backward_at(
    cfg: ModelConfig,
    capacity: int,
    x_blD: Array,
    weights_tA: Array,
    ids_tA: Array,
    w: Experts,
    dy_blD: Array,
) -> Any:
    plan = dispatch.make_plan(ids_tA, cfg.n_experts, capacity)
    _, pull = jax.vjp(lambda x, u, v: _run(cfg, capacity, x, u, v, plan), x_blD, weights_tA, w)
    dx_blD, dweights_tA, dw = pull(dy_blD)
    return dx_blD, dweights_tA.reshape(*x_blD.shape[:2], -1), dw


def _run(
    cfg: ModelConfig,
    capacity: int,
    x_blD: Array,
    weights_tA: Array,
    w: Experts,
    plan: dispatch.Plan,
) -> Array:
    """One shard's tokens through all experts, its own and those of its `expert` peers."""
    # The same on all `model` shards, each of which gives a part of the gradient: the transpose of
    # the cast adds them up.
    x_blD, weights_tA = jax.lax.pcast((x_blD, weights_tA), "model", to="varying")
    x_tD = x_blD.reshape(-1, x_blD.shape[-1])
    x_SD = dispatch.to_slots(x_tD, plan)
    x_erD = dispatch.to_experts(x_SD, capacity)
    y_erD = _ffn(x_erD, w, cfg)
    y_SD = dispatch.from_experts(y_erD, capacity)
    y_tD = dispatch.from_slots(y_SD, weights_tA, plan)
    # Each `model` shard has summed over its part of F only. Added after the combine, so that a
    # token's row moves once instead of once a choice.
    return jax.lax.psum(y_tD, "model").reshape(x_blD.shape)


def _ffn(x_erD: Array, w: Experts, cfg: ModelConfig) -> Array:
    """Each expert on its rows; this `model` shard's part of the sum over F."""
    gate_erf = jnp.einsum("erD,eDf->erf", x_erD, w.wgate_EDF)
    up_erf = jnp.einsum("erD,eDf->erf", x_erD, w.wup_EDF)
    if w.bgate_EF is not None:
        gate_erf += w.bgate_EF[:, None]
        up_erf += w.bup_EF[:, None]
    y_erD = jnp.einsum("erf,efD->erD", activate(gate_erf, up_erf, cfg), w.wdown_EFD)
    if w.bdown_ED is not None:
        # Once, though all `model` shards have it and are added up.
        first = jax.lax.axis_index("model") == 0
        y_erD += jnp.where(first, w.bdown_ED, 0)[:, None]
    return y_erD


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
