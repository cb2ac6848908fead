"""Where each Hugging Face tensor lies in our arrays.

A link names a tensor and its shape, and cuts an array of that shape into views that have the shapes
of slices of our leaves. Writing our slices from the views is the way in, filling the views from our
slices the way out: one description for both, and nothing is computed, so a round trip is bitwise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxmoe import tree
from jaxmoe.config import ModelConfig
from jaxmoe.model.lm import lm_specs
from jaxmoe.model.stack import Kind, segments
from jaxmoe.spec import Spec, is_spec

# (leaf, index into it, view with the shape of leaf[index])
Cell = tuple[str, tuple[Any, ...], np.ndarray]


@dataclass(frozen=True)
class Link:
    """One tensor of theirs.

    Attributes:
        name: theirs.
        shape: theirs.
        cells: an array of that shape -> slices of our leaves and views that belong to them.
        copy: it repeats a tensor that another link brings; may be absent.
        by_rows: its first dim is also the first of every view, so that rows of it may come alone.
    """

    name: str
    shape: tuple[int, ...]
    cells: Callable[[np.ndarray], list[Cell]]
    copy: bool = False
    by_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family names and packs what is not the same in all of them."""

    moe: str = "mlp"  # the module with router and experts
    router: str = "gate"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    packed: bool = False  # all experts in one tensor, gate and up interleaved


def links(cfg: ModelConfig, layout: Layout) -> list[Link]:
    """All tensors of a model, in the order of its layers."""
    return list(_Links(cfg, layout).all())


class _Links:
    def __init__(self, cfg: ModelConfig, layout: Layout) -> None:
        self.cfg, self.layout = cfg, layout
        self.specs: dict[str, Spec] = dict(tree.named_leaves(lm_specs(cfg), is_leaf=is_spec))

    def all(self) -> Iterator[Link]:
        yield self.plain("model.embed_tokens.weight", "embed_VD")
        number = 0
        for s, segment in enumerate(segments(self.cfg)):
            for r in range(segment.repeats):
                for p, kind in enumerate(segment.period):
                    ours, theirs = f"layers/{s}/{p}", f"model.layers.{number}"
                    yield from self.layer(theirs, ours, (r,), kind)
                    number += 1
        yield self.plain("model.norm.weight", "final_norm_D")
        if not self.cfg.tie_embeddings:
            yield self.matrix("lm_head.weight", "head_DV")
        for k in range(self.cfg.n_mtp):
            yield from self.mtp(f"model.layers.{number + k}", f"mtp/{k}")

    # Forms

    def plain(self, name: str, leaf: str, at: tuple[int, ...] = (), copy: bool = False) -> Link:
        """The same values in the same order, our dims perhaps merged into fewer of theirs."""
        shape = self.specs[leaf].shape[len(at) :]
        if "vocab" in self.specs[leaf].axes:
            return Link(name, shape, lambda h: [(leaf, at, h)], copy, by_rows=True)
        return Link(name, (math.prod(shape),), lambda h: [(leaf, at, h.reshape(shape))], copy)

    def matrix(self, name: str, leaf: str, at: tuple[int, ...] = (), copy: bool = False) -> Link:
        """theirs [out, in], ours (in dims, out dims)."""
        shape, n = self.dims(leaf, at)
        outs, ins = shape[n:], shape[:n]
        theirs = (math.prod(outs), math.prod(ins))
        return Link(name, theirs, lambda h: [(leaf, at, _swapped(h, outs, ins))], copy)

    def dims(self, leaf: str, at: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Of leaf[at]: its shape, and how many of its dims are inputs."""
        return self.specs[leaf].shape[len(at) :], len(self.specs[leaf].inputs)

    # Layers

    def layer(self, theirs: str, ours: str, at: tuple[int, ...], kind: Kind) -> Iterator[Link]:
        yield self.plain(f"{theirs}.input_layernorm.weight", f"{ours}/attention_norm_D", at)
        attention = self.grouped if self.cfg.mla is None else self.latent
        yield from attention(f"{theirs}.self_attn", f"{ours}/attention", at)
        yield self.plain(f"{theirs}.post_attention_layernorm.weight", f"{ours}/ffn_norm_D", at)
        if kind.moe:
            yield from self.moe(f"{theirs}.{self.layout.moe}", f"{ours}/ffn", at)
        else:
            yield from self.ffn(f"{theirs}.mlp", f"{ours}/ffn", at)

    def grouped(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        for x, dims in (("q", "NH"), ("k", "KH"), ("v", "KH")):
            yield self.matrix(f"{theirs}.{x}_proj.weight", f"{ours}/w{x}_D{dims}", at)
            if self.cfg.attention_bias:
                yield self.plain(f"{theirs}.{x}_proj.bias", f"{ours}/b{x}_{dims}", at)
            if self.cfg.qk_norm != "none" and x != "v":
                yield self.plain(f"{theirs}.{x}_norm.weight", f"{ours}/{x}_norm", at)
        yield self.matrix(f"{theirs}.o_proj.weight", f"{ours}/wo_NHD", at)
        if self.cfg.attention_bias:
            yield self.plain(f"{theirs}.o_proj.bias", f"{ours}/bo_D", at)
        if self.cfg.attention_sinks:
            yield self.plain(f"{theirs}.sinks", f"{ours}/sinks_N", at)

    def latent(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        mla, d, n = self.cfg.mla, self.cfg.d_model, self.cfg.n_heads
        assert mla is not None
        q_name = "q_proj"
        if mla.q_rank:
            yield self.matrix(f"{theirs}.q_a_proj.weight", f"{ours}/wqa_DQ", at)
            yield self.plain(f"{theirs}.q_a_layernorm.weight", f"{ours}/q_norm_Q", at)
            q_name = "q_b_proj"
        h, q = mla.d_nope + mla.d_rope, mla.q_rank or d

        def queries(a: np.ndarray) -> list[Cell]:
            return _interleaved(f"{ours}/wq_QNH", at, _swapped(a, (n, h), (q,)), mla.d_nope)

        def keys(a: np.ndarray) -> list[Cell]:
            latent, rotary = a[: mla.kv_rank].T, a[mla.kv_rank :].T
            return [(f"{ours}/wkva_DJ", at, latent), *_interleaved(f"{ours}/wkr_DW", at, rotary, 0)]

        def from_latent(a: np.ndarray) -> list[Cell]:
            both = _swapped(a, (n, mla.d_nope + mla.d_value), (mla.kv_rank,))
            k, v = both[..., : mla.d_nope], both[..., mla.d_nope :]
            return [(f"{ours}/wk_JNI", at, k), (f"{ours}/wv_JNU", at, v)]

        yield Link(f"{theirs}.{q_name}.weight", (n * h, q), queries)
        width = mla.kv_rank + mla.d_rope
        yield Link(f"{theirs}.kv_a_proj_with_mqa.weight", (width, d), keys)
        yield self.plain(f"{theirs}.kv_a_layernorm.weight", f"{ours}/kv_norm_J", at)
        width = n * (mla.d_nope + mla.d_value)
        yield Link(f"{theirs}.kv_b_proj.weight", (width, mla.kv_rank), from_latent)
        yield self.matrix(f"{theirs}.o_proj.weight", f"{ours}/wo_NUD", at)

    def ffn(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        for name, leaf in (("gate", "wgate_DF"), ("up", "wup_DF"), ("down", "wdown_FD")):
            yield self.matrix(f"{theirs}.{name}_proj.weight", f"{ours}/{leaf}", at)

    def moe(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        router = f"{theirs}.{self.layout.router}"
        yield self.matrix(f"{router}.weight", f"{ours}/router/w_DE", at)
        if self.cfg.router.bias:
            yield self.plain(f"{router}.bias", f"{ours}/router/bias_E", at)
        if self.cfg.router.balance_bias_rate is not None:
            bias = f"{ours}/router/balance_bias_E"
            yield self.plain(f"{router}.e_score_correction_bias", bias, at)
        experts = self.packed if self.layout.packed else self.separate
        yield from experts(f"{theirs}.experts", f"{ours}/experts", at)
        if self.cfg.n_shared_experts:
            yield from self.ffn(f"{theirs}.shared_experts", f"{ours}/shared", at)

    def separate(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        for e in range(self.cfg.n_experts):
            leaves = ("wgate_EDF", "wup_EDF", "wdown_EFD")
            for name, leaf in zip(self.layout.experts, leaves, strict=True):
                yield self.matrix(f"{theirs}.{e}.{name}.weight", f"{ours}/{leaf}", (*at, e))

    def packed(self, theirs: str, ours: str, at: tuple[int, ...]) -> Iterator[Link]:
        e, d, f = self.cfg.n_experts, self.cfg.d_model, self.cfg.d_ff

        def pairs(gate: str, up: str, a: np.ndarray) -> list[Cell]:
            return [(f"{ours}/{gate}", at, a[..., 0::2]), (f"{ours}/{up}", at, a[..., 1::2])]

        def same(leaf: str, a: np.ndarray) -> list[Cell]:
            return [(f"{ours}/{leaf}", at, a)]

        weights, biases = (
            partial(pairs, "wgate_EDF", "wup_EDF"),
            partial(pairs, "bgate_EF", "bup_EF"),
        )
        down, bias = partial(same, "wdown_EFD"), partial(same, "bdown_ED")
        yield Link(f"{theirs}.gate_up_proj", (e, d, 2 * f), weights, by_rows=True)
        yield Link(f"{theirs}.down_proj", (e, f, d), down, by_rows=True)
        if self.cfg.expert_bias:
            yield Link(f"{theirs}.gate_up_proj_bias", (e, 2 * f), biases)
            yield Link(f"{theirs}.down_proj_bias", (e, d), bias)

    def mtp(self, theirs: str, ours: str) -> Iterator[Link]:
        d = self.cfg.d_model

        def halves(a: np.ndarray) -> list[Cell]:
            return [(f"{ours}/wembed_DD", (), a[:, :d].T), (f"{ours}/whidden_DD", (), a[:, d:].T)]

        yield self.plain(f"{theirs}.embed_tokens.weight", "embed_VD", copy=True)
        yield self.plain(f"{theirs}.enorm.weight", f"{ours}/embed_norm_D")
        yield self.plain(f"{theirs}.hnorm.weight", f"{ours}/hidden_norm_D")
        yield Link(f"{theirs}.eh_proj.weight", (d, 2 * d), halves)
        yield from self.layer(
            theirs, f"{ours}/layer", (), Kind(moe=not self.cfg.is_dense, window=None)
        )
        yield self.plain(f"{theirs}.shared_head.norm.weight", f"{ours}/final_norm_D")
        yield self.matrix(f"{theirs}.shared_head.head.weight", "head_DV", copy=True)


def _swapped(a: np.ndarray, outs: tuple[int, ...], ins: tuple[int, ...]) -> np.ndarray:
    """[prod(outs), prod(ins)] seen as (*ins, *outs)."""
    whole = a.reshape(*outs, *ins)
    n = len(outs)
    return whole.transpose(*range(n, whole.ndim), *range(n))


def _interleaved(leaf: str, at: tuple[int, ...], a: np.ndarray, first: int) -> list[Cell]:
    """Their rotary pairs lie side by side, ours half a width apart (both give the same scores)."""
    half = (a.shape[-1] - first) // 2
    ends = (slice(None, first), slice(first, first + half), slice(first + half, None))
    views = (a[..., :first], a[..., first::2], a[..., first + 1 :: 2])
    rest = (slice(None),) * (a.ndim - 1)
    cells = [(leaf, (*at, *rest, end), view) for end, view in zip(ends, views, strict=True)]
    return cells[1:] if first == 0 else cells
