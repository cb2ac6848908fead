"""Mixture-of-experts feed-forward: top-k router, dropless dispatch, gated and shared experts.

In a step the rows of a shard travel over the `expert` axis to the devices that hold their experts
(kernels/exchange.py), go through the experts, and come back. Buffers have a size that is picked at
run time among a few compiled ones by the largest load anywhere; where the last does not suffice it
is filled as often as it takes, so no token is ever dropped, no shape depends on the data and memory
is bounded. The VJP is our own: it keeps the inputs and the order of the choices and switches again,
since differentiating a switch would keep the residuals of every branch. Where there is nothing to
switch, on one shard of experts, it keeps the hidden rows too, if `model.remat` says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe import transfer
from jaxmoe.config import ModelConfig
from jaxmoe.kernels import dispatch, exchange
from jaxmoe.kernels.low_precision import einsum
from jaxmoe.mesh import (
    COMPUTE,
    batch,
    from_stream,
    partition,
    platform,
    to_stream,
    vary,
    vary_alike,
    varying,
    ways,
)
from jaxmoe.model import blocked, sorted_experts
from jaxmoe.model.ffn import activate, ffn, ffn_specs
from jaxmoe.model.remat import CHOICE, HIDDEN, keeps_hidden, named
from jaxmoe.model.router import Router, RouterSums, route, router_specs
from jaxmoe.spec import Spec, map_specs

Array = jax.Array


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
            gain=transfer.residual_gain(cfg),
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
) -> tuple[Array, RouterSums]:
    """The block's output, spread as the residual stream is, and what the router did, as sums.
    Parameters as gathered for compute."""
    spread = exchange.sends_own_rows(x_BLD.shape[1], jax.sharding.get_abstract_mesh().shape)
    x_BLD = to_stream(x_BLD) if spread else from_stream(x_BLD)
    with jax.named_scope("router"):
        weights_BLA, ids_BLA, sums = route(params.router, x_BLD, cfg, valid_BL, key)
    with jax.named_scope("experts"):
        y_BLD, overflow = experts(cfg, x_BLD, weights_BLA, ids_BLA, params.experts)
        y_BLD = to_stream(y_BLD)
    if params.shared is not None:
        with jax.named_scope("shared_experts"):
            y_BLD += to_stream(ffn(params.shared, from_stream(x_BLD), cfg))
    return y_BLD, replace(sums, overflow=overflow)


def _weights_spec(cfg: ModelConfig) -> Experts:
    return map_specs(lambda spec: partition(spec, COMPUTE), moe_specs(cfg).experts)


def _row_axes(x_tD: Array) -> tuple[str, ...]:
    """Mesh axes over which an expert's rows are spread, but not its weights."""
    return tuple(sorted(varying(x_tD) - {"expert", "model"}))


def _row_specs(x_BLD: Array) -> tuple[P, dispatch.Order]:
    """Of rows, and of a shard's `Order`: each shard of the batch and of the positions, which may be
    spread over `model` too, has its own."""
    over = ("context", "model") if _is_stream(x_BLD) else ("context",)
    of_all = P((*batch(), *over))
    ordered = dispatch.Order(choice_S=of_all, place_tA=P(*of_all, None), load_E=of_all)
    return P(batch(), over, None), ordered


def _hidden_spec() -> P:
    """Of hidden rows, in the order of a shard's buffer, with its part of F."""
    return P((*batch(), "context", "model"))


def _is_stream(x_BLD: Array) -> bool:
    return "model" in (jax.typeof(x_BLD).sharding.spec[1] or ())


def _apply_experts(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Experts
) -> tuple[Array, Array]:
    """sum_a weight_a * expert_a(x) for every token; and 1.0 where the first size of the buffers
    did not suffice, 0.0 elsewhere. Differentiable in x, the combine weights and w."""
    return _run(cfg, x_BLD, weights_BLA, ids_BLA, w, keep=False)[0]


def _experts_fwd(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Experts
) -> tuple[tuple[Array, Array], Any]:
    keep = keeps_hidden(cfg) and path_of(cfg) != "batched" and ways(("expert",)) == 1
    return _run(cfg, x_BLD, weights_BLA, ids_BLA, w, keep=keep)


def _run(
    cfg: ModelConfig, x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Experts, *, keep: bool
) -> tuple[tuple[Array, Array], Any]:
    """What the experts give, and what the backward pass reads."""
    rows, ordered = _row_specs(x_BLD)
    with jax.named_scope("dispatch"):
        order = jax.shard_map(partial(_order, cfg), in_specs=rows, out_specs=ordered)(ids_BLA)
    order = named(order, CHOICE)  # a sort of small numbers, not to be done again
    mapped: Any = jax.shard_map(
        partial(_forward, cfg, keep),
        in_specs=(rows, rows, rows, ordered, _weights_spec(cfg)),
        out_specs=((rows, P()), _hidden_spec()),
    )
    out, kept = mapped(x_BLD, weights_BLA, ids_BLA, order, w)
    return out, (x_BLD, weights_BLA, ids_BLA, order, w, named(kept, HIDDEN))


def _experts_bwd(cfg: ModelConfig, residuals: Any, cts: Any) -> tuple[Any, ...]:
    rows, ordered = _row_specs(residuals[0])
    mapped: Any = jax.shard_map(
        partial(_backward, cfg),
        in_specs=(rows, rows, rows, ordered, _weights_spec(cfg), _hidden_spec(), rows),
        out_specs=(rows, rows, _weights_spec(cfg)),
    )
    dx_BLD, dweights_BLA, dw = mapped(*residuals, cts[0])
    return dx_BLD, dweights_BLA, None, dw


experts: Any = jax.custom_vjp(_apply_experts, nondiff_argnums=(0,))
experts.defvjp(_experts_fwd, _experts_bwd)


def path_of(cfg: ModelConfig) -> str:
    """How the experts are computed here: what `expert_path` says, or "auto" means."""
    if cfg.expert_path != "auto":
        return cfg.expert_path
    if platform() == "cpu":
        return "blocked"
    return "kernel" if cfg.matmul == "plain" else "batched"


def exchange_of(cfg: ModelConfig, tokens: int, shards: int) -> str:
    """How rows travel between `shards` that send `tokens` each: what `expert_exchange` says, or
    "auto" means. Equal slots (`batched`) are what all-to-all gives, and it alone."""
    if path_of(cfg) == "batched":
        return "all_to_all"
    if shards == 1 or cfg.expert_exchange == "auto":
        return exchange.cheapest(tokens, shards, cfg.n_experts, cfg.top_k)
    return cfg.expert_exchange


# Inside of shard_map


def _order(cfg: ModelConfig, ids_blA: Array) -> dispatch.Order:
    return dispatch.make_order(ids_blA.reshape(-1, cfg.top_k), cfg.n_experts)


# The dim of D in the matrices, which rests sharded over these axes.
_FSDP = {"wgate_EDF": 1, "wup_EDF": 1, "wdown_EFD": 2}
_FSDP_AXES = COMPUTE["expert_embed"]


@jax.named_scope("gather")
def _gathered(w: Experts, x_tD: Array) -> Experts:
    """Matrices with all of D, and marked as different wherever the rows are: else the transpose of
    an implicit cast would put a collective into the loops. The down bias is on all `model` shards,
    and only the first one's counts."""
    whole = {
        name: jax.lax.all_gather(getattr(w, name), _FSDP_AXES, axis=dim, tiled=True)
        for name, dim in _FSDP.items()
    }
    w, over = replace(w, **whole), set(_row_axes(x_tD))
    bias = None if w.bdown_ED is None else vary(w.bdown_ED, over | {"model"})
    w = jax.tree.map(lambda a: vary(a, over), replace(w, bdown_ED=None))
    return replace(w, bdown_ED=bias)


@jax.named_scope("scatter")
def _summed(dw: Experts, x_tD: Array) -> Experts:
    """Gradients over all shards of the batch, each left with its part of D: scattered over those
    axes first, so that the other axes, of slower links, carry parts only."""
    rows = _row_axes(x_tD)
    others = tuple(axis for axis in rows if axis not in _FSDP_AXES)
    parts = {
        name: jax.lax.psum_scatter(getattr(dw, name), _FSDP_AXES, scatter_dimension=dim, tiled=True)
        for name, dim in _FSDP.items()
    }
    dw = replace(dw, **(jax.lax.psum(parts, others) if others else parts))
    if dw.bdown_ED is None:
        return dw
    gate, up, down = jax.lax.psum((dw.bgate_EF, dw.bup_EF, dw.bdown_ED), rows)
    return replace(dw, bgate_EF=gate, bup_EF=up, bdown_ED=jax.lax.psum(down, "model"))


def _forward(
    cfg: ModelConfig,
    keep: bool,
    x_blD: Array,
    weights: Array,
    ids: Array,
    order: dispatch.Order,
    w: Experts,
) -> tuple[tuple[Array, Array], Any]:
    x_tD, weights_tA, ids_tA = (_flat(a) for a in (x_blD, weights, ids))
    w = _gathered(w, x_tD)

    def run(kind: str, size: int, first: Array | None = None) -> Any:
        if path_of(cfg) == "batched":
            plan = dispatch.slot_plan(order, ids_tA, size, 0 if first is None else first)
            return _batched(cfg, size, x_tD, weights_tA, w, plan), None
        sent = exchange.open_exchange(kind, order, ids_tA, size, first)
        return _through(cfg, sent, x_tD, weights_tA, w, keep=keep)

    (y_tD, kept), overflow = _switch(cfg, order, run, like=(x_tD, None))
    return (y_tD.reshape(x_blD.shape), overflow), kept


def _backward(
    cfg: ModelConfig,
    x_blD: Array,
    weights: Array,
    ids: Array,
    order: dispatch.Order,
    w: Experts,
    kept: Any,
    dy_blD: Array,
) -> tuple[Array, Array, Experts]:
    x_tD, weights_tA, ids_tA, dy_tD = (_flat(a) for a in (x_blD, weights, ids, dy_blD))
    w = _gathered(w, x_tD)

    def run(kind: str, size: int, first: Array | None = None) -> Any:
        if path_of(cfg) == "batched":
            plan = dispatch.slot_plan(order, ids_tA, size, 0 if first is None else first)
            _, pull = jax.vjp(
                lambda x, u, v: _batched(cfg, size, x, u, v, plan), x_tD, weights_tA, w
            )
            return pull(dy_tD)
        sent = exchange.open_exchange(kind, order, ids_tA, size, first)
        return _through_backward(cfg, sent, x_tD, weights_tA, w, dy_tD, kept)

    like = x_tD, weights_tA, w
    (dx_tD, dweights_tA, dw), _ = _switch(cfg, order, run, like)
    return dx_tD.reshape(x_blD.shape), dweights_tA.reshape(weights.shape), _summed(dw, x_tD)


def _switch(cfg: ModelConfig, order: dispatch.Order, run: Any, like: Any) -> tuple[Any, Array]:
    """run(kind of exchange, size) at the smallest compiled size that suffices for the loads of all
    shards, or the sum of several runs of the largest one; and whether the first one did not do.

    Args:
        like: arrays of the types that `run` gives.
    """
    t, shards = len(order.place_tA), jax.lax.axis_size("expert")
    kind = exchange_of(cfg, t, shards)
    if kind == "all_gather" and exchange.is_spread(order.load_E):
        t *= jax.lax.axis_size("model")  # they fill one buffer
    shape = (kind, t, shards, cfg.n_experts, cfg.top_k)
    sizes, most = exchange.sizes(*shape), exchange.most(*shape)
    if sizes == [most]:
        return run(kind, most), jnp.float32(0)
    # One answer for all devices: the branches hold collectives.
    needed = exchange.needed(kind, order)
    largest = jax.lax.pmax(needed, tuple(sorted(varying(needed))))
    branches = [partial(run, kind, size) for size in sizes]
    if sizes[-1] < most:
        branches.append(partial(_rounds, run, kind, sizes[-1], largest, like))
    index = (largest > jnp.array(sizes[: len(branches) - 1], jnp.int32)).sum()
    return jax.lax.switch(index, branches), (index > 0).astype(jnp.float32)


def _rounds(run: Any, kind: str, size: int, largest: Array, like: Any) -> Any:
    """The sum of what run(kind, size, first) gives for first = 0, size, ... below `largest`."""

    def add(i: Array, total: Any) -> Any:
        # The barrier: libtpu 0.0.42 fails on an all-reduce in a loop whose sum is cast and added up
        # ("while_loop_all_reduce_code_motion ... RET_CHECK").
        part = jax.tree.map(jax.lax.optimization_barrier, run(kind, size, i * size))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)

    # float32: a token's choices may be in several rounds.
    zeros = jax.tree.map(lambda a: vary_alike(jnp.zeros(a.shape, jnp.float32), a)[0], like)
    total = jax.lax.fori_loop(0, -(-largest // size), add, zeros)
    return jax.tree.map(lambda a, b: a.astype(b.dtype), total, like)


# Ways to compute the rows that an exchange has brought.
_ENGINES: Mapping[str, Any] = {"blocked": blocked, "kernel": sorted_experts}


def _through(
    cfg: ModelConfig,
    sent: exchange.Exchange,
    x_tD: Array,
    weights_tA: Array,
    w: Experts,
    *,
    keep: bool,
) -> tuple[Array, Any]:
    """One shard's output: its rows to their experts, through them and back; and their hidden rows
    if they are to be kept."""
    with jax.named_scope("dispatch"):
        x_SD, weights_S = _varying(sent.rows(x_tD), sent.weights(weights_tA))
    with jax.named_scope("matmuls"):
        y_SD, kept = _ENGINES[path_of(cfg)].compute(cfg, sent, w, x_SD, weights_S, keep=keep)
    with jax.named_scope("combine"):
        return dispatch.completed(sent.sum_back(y_SD), exchange.is_spread(x_tD)), kept


def _through_backward(
    cfg: ModelConfig,
    sent: exchange.Exchange,
    x_tD: Array,
    weights_tA: Array,
    w: Experts,
    dy_tD: Array,
    kept: Any,
) -> tuple[Array, Array, Experts]:
    """Gradients of x, the combine weights and, from this shard's rows, the experts' parameters."""
    rows, weights = sent.rows, sent.weights
    with jax.named_scope("dispatch"):
        x_SD, weights_S, dy_SD = _varying(rows(x_tD), weights(weights_tA), rows(dy_tD))
    gradients = _ENGINES[path_of(cfg)].gradients
    with jax.named_scope("matmuls"):
        dw, dx_SD, dweights_S = gradients(cfg, sent, w, x_SD, weights_S, dy_SD, kept)
    spread = exchange.is_spread(x_tD)
    with jax.named_scope("combine"):
        dx_tD = dispatch.completed(sent.sum_back(dx_SD), spread)
        dweights_tA = dispatch.completed(sent.weights_back(dweights_S), spread)
    return dx_tD, dweights_tA, dw


def _varying(*rows: Array) -> tuple[Array, ...]:
    """Marked as different on all `model` shards, each of which has its part of F."""
    return tuple(vary(a, ("model",)) for a in rows)


def _flat(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _batched(
    cfg: ModelConfig,
    capacity: int,
    x_tD: Array,
    weights_tA: Array,
    w: Experts,
    plan: dispatch.Plan,
) -> Array:
    """One shard's tokens through all experts, its own and those of its `expert` peers, in equal
    slots."""
    spread = exchange.is_spread(x_tD)
    # Where they are the same on all `model` shards, each of which gives a part of the gradient, the
    # transpose of the cast adds them up.
    x_tD, weights_tA = _varying(x_tD, weights_tA)
    with jax.named_scope("dispatch"):
        x_SD = dispatch.to_slots(x_tD, plan)
        x_erD = dispatch.to_experts(x_SD, capacity, spread)
    with jax.named_scope("matmuls"):
        y_erD = _ffn(x_erD, w, cfg)
    with jax.named_scope("combine"):
        y_SD = dispatch.from_experts(y_erD, capacity, spread)
        y_tD = dispatch.from_slots(y_SD, weights_tA, plan)
        # Each `model` shard has summed over its part of F only. Added after the combine, so that a
        # token's row moves once instead of once a choice.
        return dispatch.completed(y_tD, spread)


def _ffn(x_erD: Array, w: Experts, cfg: ModelConfig) -> Array:
    """Each expert on its rows; this `model` shard's part of the sum over F."""
    gate_erf = einsum("erD,eDf->erf", x_erD, w.wgate_EDF, cfg.matmul)
    up_erf = einsum("erD,eDf->erf", x_erD, w.wup_EDF, cfg.matmul)
    if w.bgate_EF is not None:
        gate_erf += w.bgate_EF[:, None]
        up_erf += w.bup_EF[:, None]
    hidden_erf = activate(gate_erf, up_erf, cfg)
    y_erD = einsum("erf,efD->erD", hidden_erf, w.wdown_EFD, cfg.matmul)
    if w.bdown_ED is not None:
        # Once, though all `model` shards have it and are added up.
        first = jax.lax.axis_index("model") == 0
        y_erD += jnp.where(first, w.bdown_ED, 0)[:, None]
    return y_erD
