"""The layers: which kind each one is, and scans over those that repeat.

Layers of a model differ only in whether they have experts and in their window, by a pattern that
repeats. Each segment is one scan whose body is a whole period of the pattern, so that compile time
does not grow with depth.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh, transfer
from jaxmoe.config import MeshConfig, ModelConfig
from jaxmoe.mesh import from_stream, gather, to_stream
from jaxmoe.model import pipeline
from jaxmoe.model.attention import Places, attention, attention_specs
from jaxmoe.model.ffn import ffn, ffn_specs
from jaxmoe.model.moe import moe, moe_specs
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.model.remat import INPUT, named, offloaded, rematerialised
from jaxmoe.model.router import RouterSums
from jaxmoe.spec import map_specs, stack

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What makes a layer differ from others of its model."""

    moe: bool
    window: int | None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`repeats` times the layers of `period`, one after another."""

    period: tuple[Kind, ...]
    repeats: int


@struct.dataclass
class Layer:
    attention_norm_D: Any
    attention: Any  # Attention or Mla
    ffn_norm_D: Any
    ffn: Any  # Moe or Ffn


# Router sums of each segment, by layer of its period; None for layers without experts.
Stats = tuple[tuple[RouterSums | None, ...], ...]


def kinds(cfg: ModelConfig) -> list[Kind]:
    """The kind of every layer, in order."""

    def kind(i: int) -> Kind:
        after = i - cfg.first_dense
        has_experts = not cfg.is_dense and after >= 0 and (after + 1) % cfg.moe_every == 0
        sees_all = cfg.global_every > 0 and (i + 1) % cfg.global_every == 0
        return Kind(moe=has_experts, window=None if sees_all else cfg.sliding_window)

    return [kind(i) for i in range(cfg.n_layers)]


def segments(cfg: ModelConfig) -> tuple[Segment, ...]:
    """The leading dense layers, those after them by whole periods, and what is left of one."""
    every = kinds(cfg)
    parts = (
        (every[: cfg.first_dense], max(1, cfg.global_every)),
        (
            every[cfg.first_dense :],
            math.lcm(cfg.moe_every, max(1, cfg.global_every)),
        ),
    )
    found = []
    for layers, period in parts:
        whole = len(layers) // period
        if whole:
            found.append(Segment(period=tuple(layers[:period]), repeats=whole))
        if rest := layers[whole * period :]:
            found.append(Segment(period=tuple(rest), repeats=1))
    return tuple(found)


def main_segment(cfg: ModelConfig) -> int:
    """The one with the most layers, which a pipeline spreads over its stages; the others are
    outside of it."""
    sizes = [len(s.period) * s.repeats for s in segments(cfg)]
    return sizes.index(max(sizes))


def layer_specs(cfg: ModelConfig, kind: Kind) -> Layer:
    dense = partial(ffn_specs, width=cfg.d_ff_dense or cfg.d_ff)
    layer = Layer(
        attention_norm_D=rms_norm_specs(cfg.d_model),
        attention=attention_specs(cfg),
        ffn_norm_D=rms_norm_specs(cfg.d_model),
        ffn=moe_specs(cfg) if kind.moe else dense(cfg),
    )
    return map_specs(lambda s: replace(s, depth=transfer.depth_ratio(cfg)), layer)


def layers_specs(cfg: ModelConfig) -> tuple[tuple[Layer, ...], ...]:
    """By segment and layer of its period, stacked over the repeats on a leading dim R."""
    longest = main_segment(cfg)
    return tuple(
        tuple(
            stack(layer_specs(cfg, kind), segment.repeats, "layers" if i == longest else "others")
            for kind in segment.period
        )
        for i, segment in enumerate(segments(cfg))
    )


@jax.named_scope("layers")
def run_layers(
    params: tuple[tuple[Layer, ...], ...],
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    key: Array | None = None,
    layout: MeshConfig | None = None,
) -> tuple[Array, Stats]:
    """All layers; `key` is for the router's jitter, `layout` says how the pipeline goes."""
    stats, longest = [], main_segment(cfg)
    for number, (segment, stacked) in enumerate(zip(segments(cfg), params, strict=True)):
        keys = _split(key, number, segment.repeats)
        if number == longest and pipeline.stages() > 1:
            run = partial(_in_stages, layout=layout or MeshConfig())
        else:
            run = _one_after_another
        x_BLD, of_segment = run(stacked, keys, x_BLD, places, cfg, segment.period)
        stats.append(of_segment)
    return x_BLD, tuple(stats)


def _one_after_another(
    params: Any,
    keys: Array | None,
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    period: tuple[Kind, ...],
) -> tuple[Array, Any]:
    body = partial(_period, period=period, places=places, cfg=cfg)
    return jax.lax.scan(body, x_BLD, (jax.tree.map(unstaged, params), keys))


def unstaged(a: Array) -> Array:
    """A scan wants its dim on every device: over a `stage` axis of size 1 it is, but its type says
    otherwise."""
    return jax.reshard(a, P(None, *tuple(jax.typeof(a).sharding.spec)[1:]))


def _in_stages(
    params: Any,
    keys: Array | None,
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    period: tuple[Kind, ...],
    layout: MeshConfig,
) -> tuple[Array, Any]:
    """In a pipeline, each item of which keeps its input alone, whatever `remat` is."""
    rows = len(x_BLD) // mesh.ways(mesh.batch())
    plan = pipeline.schedule(layout, pipeline.stages(), rows)
    if keys is not None and plan.rounds > 1:
        keys = keys.reshape(plan.rounds, -1)
    own_turns = places.documents_BL is not None  # each row has positions of its own

    def part(
        layers: Any, keys: Any, x_BLD: Array, beside: Any, common: Any, number: Array
    ) -> tuple[Array, Any]:
        if keys is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        here = beside if own_turns else Places(turns=common)
        return _one_after_another(layers, keys, x_BLD, here, cfg, period)

    beside, common = (places, None) if own_turns else (None, places.turns)
    return pipeline.run(part, params, keys, x_BLD, beside, common, plan)


def _period(
    x_BLD: Array,
    inputs: tuple[tuple[Layer, ...], Array | None],
    *,
    period: tuple[Kind, ...],
    places: Places,
    cfg: ModelConfig,
) -> tuple[Array, tuple[RouterSums | None, ...]]:
    layers, key = inputs
    stats = []
    for number, (kind, params) in enumerate(zip(period, layers, strict=True)):
        own = None if key is None else jax.random.fold_in(key, number)
        x_BLD, of_layer = run_layer(params, x_BLD, places, cfg, kind, own)
        stats.append(of_layer)
    return x_BLD, tuple(stats)


def run_layer(
    params: Layer,
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    kind: Kind,
    key: Array | None = None,
) -> tuple[Array, RouterSums | None]:
    """One layer, from parameters as they rest."""
    whole = partial(_layer, cfg=cfg, kind=kind)
    return offloaded(whole, cfg)(params, x_BLD, places, key)


def _layer(
    params: Layer, x_BLD: Array, places: Places, key: Array | None, *, cfg: ModelConfig, kind: Kind
) -> tuple[Array, RouterSums | None]:
    def attending(x_BLD: Array, params: Layer) -> Array:
        return attend(params, x_BLD, places, cfg, kind)

    def feeding(x_BLD: Array, params: Layer) -> tuple[Array, RouterSums | None]:
        return feed(params, x_BLD, places, cfg, kind, key)

    x_BLD = named(x_BLD, INPUT)
    x_BLD = named(x_BLD + rematerialised(attending, cfg)(x_BLD, params), INPUT)
    # Of the experts too: their own VJP keeps only their inputs (moe.py), but the norm's and the
    # router's float32 arrays would wait for all layers.
    y_BLD, stats = rematerialised(feeding, cfg)(x_BLD, params)
    return x_BLD + y_BLD, stats


@jax.named_scope("attention")
def attend(params: Layer, x_BLD: Array, places: Places, cfg: ModelConfig, kind: Kind) -> Array:
    """What attention adds to the residual stream; from parameters as they rest."""
    h_BLD = from_stream(rms_norm(params.attention_norm_D, x_BLD, cfg.norm_eps))
    own = gather(params.attention, layer_specs(cfg, kind).attention, jnp.dtype(cfg.dtype))
    return _scaled(to_stream(attention(own, h_BLD, places, cfg, kind.window)), cfg)


def feed(
    params: Layer,
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    kind: Kind,
    key: Array | None = None,
) -> tuple[Array, RouterSums | None]:
    """What the feed-forward or the experts add to it, and what the router did."""
    with jax.named_scope("moe" if kind.moe else "ffn"):
        return _feed(params, x_BLD, places, cfg, kind, key)


def _feed(
    params: Layer, x_BLD: Array, places: Places, cfg: ModelConfig, kind: Kind, key: Array | None
) -> tuple[Array, RouterSums | None]:
    h_BLD = rms_norm(params.ffn_norm_D, x_BLD, cfg.norm_eps)
    own = gather(params.ffn, layer_specs(cfg, kind).ffn, jnp.dtype(cfg.dtype))
    if not kind.moe:
        return _scaled(to_stream(ffn(own, from_stream(h_BLD), cfg)), cfg), None
    valid_BL = None if places.documents_BL is None else places.documents_BL > 0
    y_BLD, stats = moe(own, h_BLD, cfg, valid_BL, key)
    return _scaled(y_BLD, cfg), stats


def _scaled(y_BLD: Array, cfg: ModelConfig) -> Array:
    scale = transfer.residual_scale(cfg)
    return y_BLD if scale == 1 else y_BLD * scale


def _split(key: Array | None, number: int, repeats: int) -> Array | None:
    return None if key is None else jax.random.split(jax.random.fold_in(key, number), repeats)


def in_order(stats: Stats) -> RouterSums | None:
    """Sums of all layers with experts, in the order of the layers, on a leading dim; None for a
    dense model."""
    parts = []
    for of_segment in stats:
        present = [s for s in of_segment if s is not None]
        if present:
            # [R, p, ...] -> [R * p, ...]: the layers of one period follow each other.
            parts.append(jax.tree.map(lambda *a: _rows_of(jnp.stack(a, axis=1)), *present))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else None


def _rows_of(a: Array) -> Array:
    return a.reshape(-1, *a.shape[2:])
