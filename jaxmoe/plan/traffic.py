"""Bytes that one device sends in a step, by kind and mesh axis, and the link they go over.

Volumes are those of ring algorithms: a gather or a scatter over g devices sends (g - 1) / g of the
whole, an all-reduce twice that (Thakur et al., 2005, "Optimization of Collective Communication
Operations in MPICH", sections 4 and 5).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.kernels import exchange, ring
from jaxmoe.model.lm import lm_specs
from jaxmoe.model.stack import kinds
from jaxmoe.plan.hardware import Hardware
from jaxmoe.plan.memory import microbatches
from jaxmoe.spec import Spec, is_spec

# Axes that weights are gathered over where they are used.
GATHERED = ("data", "expert", "context")


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of traffic.

    Attributes:
        kind: what travels.
        axes: the mesh axes it travels along.
        sent: bytes a device and step.
        bandwidth: bytes a second of the link that it is held up by.
        link: "link" inside of an island, "network" between them, "both".
        hidden: whether it can run beside the compute that it does not wait for.
        last: whether it runs once, after all compute; then no bubble of a pipeline lengthens it.
    """

    kind: str
    axes: tuple[str, ...]
    sent: float
    bandwidth: float
    link: str
    hidden: bool
    last: bool = False

    @property
    def seconds(self) -> float:
        return self.sent / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What the flows of a step are computed from.

    Attributes:
        tokens: of a device in one microbatch (in a whole part without a pipeline).
        parts: of the step (train.accumulate).
        repeats: microbatches of all parts.
        layers: of one stage, as a share of all.
        width: bytes of an element in the compute dtype.
    """

    tokens: float
    parts: int
    repeats: int
    layers: float
    width: int


def flows(config: Config, sizes: dict[str, int], chip: Hardware) -> list[Flow]:
    """All that is sent; kinds that need no link are left out."""
    m = config.model
    rows = config.train.batch_size * config.train.seq_len
    ways = math.prod(sizes[axis] for axis in mesh_lib.BATCH if axis != "stage")
    parts = config.train.accumulate
    count = parts * microbatches(config, math.prod(sizes.values()))
    shape = _Shape(
        tokens=rows / ways / sizes["context"] / count,
        parts=parts,
        repeats=count,
        layers=1 / sizes["stage"],
        width=2 if m.dtype == "bfloat16" else 4,
    )
    found = [
        *_of_weights(config, sizes, chip, shape),
        _of_replicas(config, sizes, chip, shape),
        *_of_activations(config, sizes, chip, shape),
    ]
    return [flow for flow in found if flow.sent > 0]


def _of_weights(config: Config, sizes: dict[str, int], chip: Hardware, shape: _Shape) -> list[Flow]:
    specs = lm_specs(config.model)
    layers = [specs.layers, [module.layer for module in specs.mtp]]
    others = [specs.embed_VD, specs.head_DV]
    others += [(module.wembed_DD, module.whidden_DD) for module in specs.mtp]
    gathered: dict[tuple[str, ...], float] = {}
    for spec, in_layer in (
        *((s, True) for s in _leaves(layers)),
        *((s, False) for s in _leaves(others)),
    ):
        staged = spec.axes[0] == "layers"
        axes = _gathered_axes(spec, sizes)
        whole = spec.size * (shape.layers if staged else 1) * shape.width
        whole /= _ways(spec, mesh_lib.IN_USE, sizes)
        group = math.prod(sizes[a] for a in axes)
        # A layer's are made anew on the way back with rematerialisation, as experts' always are,
        # and once more for a pipeline's items; gradients are scattered once.
        again = in_layer and (config.model.remat != "none" or "experts" in spec.axes)
        passes = 2 + again + (staged and sizes["stage"] > 1)
        # Each part, and each microbatch of it, passes its layers with weights gathered anew (XLA
        # may keep them).
        times = shape.repeats if staged else shape.parts
        moved = (group - 1) / group * whole
        gathered[axes] = gathered.get(axes, 0.0) + times * passes * moved
    return [
        _flow("weights gathered, gradients scattered", axes, sent, sizes, chip, hidden=True)
        for axes, sent in gathered.items()
    ]


def _of_replicas(config: Config, sizes: dict[str, int], chip: Hardware, shape: _Shape) -> Flow:
    """Gradients once a step (run/step.py), float32 and spread as parameters rest. With
    optim.shard_over_replica they are scattered and the updates gathered, which is as much."""
    rest = 0.0
    for spec in _leaves(lm_specs(config.model)):
        share = shape.layers if spec.axes[0] == "layers" else 1.0
        rest += 4 * share * spec.size / _ways(spec, mesh_lib.STORE, sizes)
    group = sizes[mesh_lib.REPLICA]
    sent = 2 * (group - 1) / group * rest
    return _flow("gradients added up", (mesh_lib.REPLICA,), sent, sizes, chip, last=True)


def _of_activations(
    config: Config, sizes: dict[str, int], chip: Hardware, shape: _Shape
) -> list[Flow]:
    m = config.model
    row = shape.tokens * m.d_model * shape.width * shape.repeats
    layers = kinds(m)
    n_layers = len(layers) * shape.layers + m.n_mtp
    n_moe = sum(kind.moe for kind in layers) * shape.layers + m.n_mtp * (not m.is_dense)
    tensor, stages = sizes["model"], sizes["stage"]
    made = []
    # A pipeline's items are computed once more.
    forward = 2 if stages > 1 else 1
    # Attention and a feed-forward each gather their rows and scatter sums over heads or width,
    # likewise backward, and gather the rows again where they are not kept; experts do not where
    # each shard of `model` sends its own. And the sums of the embedding's rows and of the gradient
    # of the last hidden states.
    own_rows = exchange.sends_own_rows(config.train.seq_len, sizes)
    halves = 2 * n_layers - n_moe * (own_rows and not m.n_shared_experts)
    moves = halves * (2 * forward + 2 + (m.remat != "none")) + 4 / stages
    sent = moves * (tensor - 1) / tensor * row
    made.append(_flow("sums over heads and width", ("model",), sent, sizes, chip))
    if not m.is_dense and sizes["expert"] > 1:
        there, together = _exchanged(config, sizes, shape)
        times = n_moe * shape.repeats
        made += [
            _flow("rows to experts and back", ("expert",), times * there, sizes, chip, spread=True),
            _flow("experts' rows together", ("model",), times * together, sizes, chip),
        ]
    if stages > 1:
        # To the next stage, from the last one back to where rows came from, and from there to the
        # first; and gradients the other way (model/pipeline.py).
        spread = mesh_lib.stream_is_spread(config.train.seq_len, sizes)
        sent = 6 * config.mesh.rounds * row / (tensor if spread else 1)
        made.append(_flow("activations to the next stage", ("stage",), sent, sizes, chip))
    sent = shape.layers * sum(_of_keys(config, sizes, shape, kind.window) for kind in layers)
    sent += m.n_mtp * _of_keys(config, sizes, shape, m.sliding_window)
    made.append(_flow("keys and values around the ring", ("context",), sent, sizes, chip))
    return made


def _exchanged(config: Config, sizes: dict[str, int], shape: _Shape) -> tuple[float, float]:
    """Bytes a device sends in one layer, forward and backward, over `expert`, and over `model` to
    bring the rows of its shards together: the smallest buffers, as compiled."""
    m, shards = config.model, sizes["expert"]
    parts = sizes["model"] if exchange.sends_own_rows(config.train.seq_len, sizes) else 1
    tokens = max(1, round(shape.tokens / parts))
    kind = m.expert_exchange
    if kind == "auto":
        kind = exchange.cheapest(tokens, shards, m.n_experts, m.top_k)
    first = exchange.sizes(kind, tokens, shards, m.n_experts, m.top_k)[0]
    # Rows on a device behind the `expert` axis; and the share of them that came over it.
    share = (shards - 1) / shards
    if kind == "all_gather":
        rows, sent = shards * tokens, share * shards * tokens
    elif kind == "ragged":
        rows, sent = first, share * tokens * m.top_k
    else:
        rows, sent = m.n_experts * first, share * m.n_experts * first
    # There and back (twice in a pipeline); backward the rows and their gradients go there and one
    # gradient back. Beside them go combine weights, float32, with each pass there and their
    # gradients back; where rows are gathered those of all their choices, and the choices.
    forward = 2 if sizes["stage"] > 1 else 1
    numbers = (2 * forward + 3) * m.top_k if kind == "all_gather" else forward + 2
    row = (2 * forward + 3) * m.d_model * shape.width + 4 * numbers
    return sent * row, (parts - 1) * rows * row


def _of_keys(config: Config, sizes: dict[str, int], shape: _Shape, window: int | None) -> float:
    """Bytes a device sends over `context` in one layer: keys and values forward (twice in a
    pipeline) and backward, and their gradients in float32."""
    m, c, forward = config.model, sizes["context"], 2 if sizes["stage"] > 1 else 1
    if c == 1:
        return 0.0
    queries = m.n_heads // sizes["model"]
    if m.mla is not None:
        keys, width = queries, m.mla.d_nope + m.mla.d_rope + m.mla.d_value
    else:  # a single head of keys is on all shards of `model`
        keys, width = max(1, m.n_kv_heads // sizes["model"]), 2 * m.d_head
    length, own = config.train.seq_len // c, shape.tokens * keys * width
    bytes_ = round(c * own * (shape.width + 4))
    wish, heads = m.context_attention, (queries, keys)
    way = ring.pick(wish, c, window, heads=heads, length=length, bytes_=bytes_)
    there, back = ring.sends(way, window, length, c)
    return shape.repeats * own * ((forward + 1) * there * shape.width + 4 * back)


def _gathered_axes(spec: Spec, sizes: dict[str, int]) -> tuple[str, ...]:
    stored = {a for axis in spec.axes for a in mesh_lib.STORE[axis]}
    used = {a for axis in spec.axes for a in mesh_lib.IN_USE[axis]}
    return tuple(a for a in GATHERED if a in stored - used and sizes[a] > 1)


def _leaves(specs: Any) -> list[Spec]:
    return jax.tree.leaves(specs, is_leaf=is_spec)


def _ways(spec: Spec, rules: mesh_lib.Rules, sizes: dict[str, int]) -> int:
    # `layers` is accounted for as a share: it may or may not rest over `stage`.
    used = [a for axis in spec.axes if axis != "layers" for a in rules[axis]]
    return math.prod(sizes[a] for a in used)


def _flow(
    kind: str,
    axes: tuple[str, ...],
    sent: float,
    sizes: dict[str, int],
    chip: Hardware,
    **how: Any,
) -> Flow:
    """`spread`: each device sends to all others (all-to-all) and not around a ring."""
    bandwidth, link = _bandwidth(axes, sizes, chip, spread=how.pop("spread", False))
    return Flow(
        kind=kind, axes=axes, sent=sent, bandwidth=bandwidth, link=link, **{"hidden": False, **how}
    )


def _bandwidth(
    axes: tuple[str, ...], sizes: dict[str, int], chip: Hardware, *, spread: bool
) -> tuple[float, str]:
    """Devices are numbered with the last axis fastest, so an island holds whole inner axes."""
    group = math.prod(sizes[a] for a in axes)
    if group == 1:
        return chip.link, "link"
    order: list[str] = list(mesh_lib.AXES)
    inner = math.prod(sizes[a] for a in order[order.index(axes[-1]) + 1 :])
    together = min(group, max(1, chip.island // inner))  # of the group, in one island
    if together == group:
        return chip.link, "link"
    if spread:  # the share of what is sent that leaves the island
        outside = (group - together) / (group - 1)
        return min(chip.link, chip.network / outside), "both" if together > 1 else "network"
    # A ring enters and leaves an island once, over the network ports of all its members.
    return min(chip.link, chip.network * together), "both" if together > 1 else "network"
