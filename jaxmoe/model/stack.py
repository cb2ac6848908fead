"""The layers: which kind each one is, and scans over those that repeat.

Layers of a model differ only in whether they have experts and in their window, by a pattern that
repeats. Each segment is one scan whose body is a whole period of the pattern, so that compile time
does not grow with depth.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmoe.config import ModelConfig
from jaxmoe.mesh import gather
from jaxmoe.model.attention import Places, attention, attention_specs
from jaxmoe.model.ffn import ffn, ffn_specs
from jaxmoe.model.moe import moe, moe_specs
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.model.remat import rematerialised
from jaxmoe.model.router import RouterStats
from jaxmoe.spec import stack

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


# Router stats of each segment, by layer of its period; None for layers without experts.
Stats = tuple[tuple[RouterStats | None, ...], ...]


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


def layer_specs(cfg: ModelConfig, kind: Kind) -> Layer:
    dense = partial(ffn_specs, width=cfg.d_ff_dense or cfg.d_ff)
    return Layer(
        attention_norm_D=rms_norm_specs(cfg.d_model),
        attention=attention_specs(cfg),
        ffn_norm_D=rms_norm_specs(cfg.d_model),
        ffn=moe_specs(cfg) if kind.moe else dense(cfg),
    )


def layers_specs(cfg: ModelConfig) -> tuple[tuple[Layer, ...], ...]:
    """By segment and layer of its period, stacked over the repeats on a leading dim R."""
    return tuple(
        tuple(stack(layer_specs(cfg, kind), segment.repeats) for kind in segment.period)
        for segment in segments(cfg)
    )


def run_layers(
    params: tuple[tuple[Layer, ...], ...],
    x_BLD: Array,
    places: Places,
    cfg: ModelConfig,
    key: Array | None = None,
) -> tuple[Array, Stats]:
    """All layers; `key` is for the router's jitter."""
    stats = []
    for number, (segment, stacked) in enumerate(zip(segments(cfg), params, strict=True)):
        body = partial(_period, period=segment.period, places=places, cfg=cfg)
        keys = _split(key, number, segment.repeats)
        x_BLD, of_segment = jax.lax.scan(body, x_BLD, (stacked, keys))
        stats.append(of_segment)
    return x_BLD, tuple(stats)


def _period(
    x_BLD: Array,
    inputs: tuple[tuple[Layer, ...], Array | None],
    *,
    period: tuple[Kind, ...],
    places: Places,
    cfg: ModelConfig,
) -> tuple[Array, tuple[RouterStats | None, ...]]:
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
) -> tuple[Array, RouterStats | None]:
    """One layer, from parameters as they rest."""
    specs, dtype = layer_specs(cfg, kind), jnp.dtype(cfg.dtype)

    def attend(x_BLD: Array, params: Layer) -> Array:
        h_BLD = rms_norm(params.attention_norm_D, x_BLD, cfg.norm_eps)
        own = gather(params.attention, specs.attention, dtype)
        return attention(own, h_BLD, places, cfg, kind.window)

    def feed(x_BLD: Array, params: Layer) -> Array:
        h_BLD = rms_norm(params.ffn_norm_D, x_BLD, cfg.norm_eps)
        return ffn(gather(params.ffn, specs.ffn, dtype), h_BLD, cfg)

    x_BLD = x_BLD + rematerialised(attend, cfg)(x_BLD, params)
    if not kind.moe:
        return x_BLD + rematerialised(feed, cfg)(x_BLD, params), None
    # The experts keep only their inputs by themselves (moe.py), so they need no checkpoint.
    h_BLD = rms_norm(params.ffn_norm_D, x_BLD, cfg.norm_eps)
    valid_BL = None if places.documents_BL is None else places.documents_BL > 0
    y_BLD, stats = moe(gather(params.ffn, specs.ffn, dtype), h_BLD, cfg, valid_BL, key)
    return x_BLD + y_BLD, stats


def _split(key: Array | None, number: int, repeats: int) -> Array | None:
    return None if key is None else jax.random.split(jax.random.fold_in(key, number), repeats)


def in_order(stats: Stats) -> RouterStats | None:
    """Stats of all layers with experts, in the order of the layers, on a leading dim; None for a
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
