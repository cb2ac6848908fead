"""Rates and scales carried over from a small model to a large one: muP and CompleteP, from Specs.

`model.transfer` names the shape that rates were tuned on. Each Spec then knows its sizes there
(`Spec.base`), and every rule is a function of two ratios, r_in of its fan-in and r_out of its
fan-out, and of m = layers over the base's layers. At the base's own shape all are 1.

| what | rule | source |
|---|---|---|
| init std | gain / sqrt(fan_in) * min(1, sqrt(r_out / r_in)) | Yang, Simon, Bernstein 2023, eq. 4 |
| of head and router | the same times OUT_GAIN | Yang et al. 2022, appendix D.2 |
| Adam's rate | 1 / r_in | Yang et al. 2022, table 8 |
| Muon's rate | sqrt(r_out / r_in) times the norm that keeps the RMS | Bernstein and Newhouse 2024 |
| Adam's epsilon | 1 / (r_out m) | Dey et al. 2025, table 1 |
| residual branch | 1 / m; init of its last matrix as in the base | Dey et al. 2025, alpha = 1 |
| losses of the routers | 1 / m of their sum | as the residual branch: see auxiliary_scale |
| attention scores | sqrt(base head / head) / sqrt(head) | Yang et al. 2022, definition 4.1 |
| tied embedding | drawn as in the base; logits over r of the width | Yang et al. 2022, table 8 |
| weight decay | lr * decay stays: not times a matrix' own rate | Wang and Aitchison 2024 |

arXiv:2203.03466, 2310.17813, 2410.21265, 2505.01618, 2405.13698. A look-up has fan-in 1: the rate
of an embedding stays. A router maps a width that grows to experts that do not, as the head does to
the vocabulary, and gets its rules (Malasnicki et al. 2025, arXiv:2508.09752, section 3); matrices
of an expert get those of any hidden one. The number of experts, top-k and their ratio to each other
are the family's to hold: no rule carries rates over those.
"""

import math
from typing import Any

import jax

from jaxmoe.config import ModelConfig, replace
from jaxmoe.config import TransferConfig as Base
from jaxmoe.spec import Spec, is_spec

FIELDS = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_ff_dense", "mla")

# What head and router are drawn with falls with the width, against what they learn: it is drawn so
# small that small models are not another kind of model.
OUT_GAIN = 0.1


def tuned_at(model: ModelConfig) -> Base:
    """The shape of a model, for `transfer` of larger ones."""
    return Base(**{name: getattr(model, name) for name in FIELDS})


def base_model(cfg: ModelConfig) -> ModelConfig:
    """The model that rates were tuned on, but as deep as this one: its Specs are the same tree."""
    assert cfg.transfer is not None
    shape = {name: getattr(cfg.transfer, name) for name in FIELDS if name != "n_layers"}
    return replace(cfg, transfer=None, **shape)


def with_base(specs: Any, base_specs: Any) -> Any:
    """Each Spec with its sizes in the base, and drawn as wide as those say.

    Raises:
        AssertionError: the two are not of the same architecture.
    """

    def names(spec: Spec) -> tuple[str, ...]:
        """A single head is a dim like several: only where it lies on the mesh differs."""
        return tuple("heads" if axis == "one_head" else axis for axis in spec.axes)

    def one(spec: Spec, base: Spec) -> Spec:
        assert names(spec) == names(base), (spec.axes, base.axes)
        known = replace(spec, base=tuple(base.shape[i] for i in base.own_dims))
        return replace(known, gain=known.gain * init_gain(known))

    return jax.tree.map(one, specs, base_specs, is_leaf=is_spec)


# Of one parameter


def _ratios(spec: Spec) -> tuple[float, float]:
    """Of fan-in and fan-out over those in the base."""
    return spec.fan_in / spec.tuned.fan_in, spec.fan_out / spec.tuned.fan_out


def init_gain(spec: Spec) -> float:
    """What 1 / sqrt(fan_in) is multiplied by, so that the matrix' norm is sqrt(fan_out / fan_in):
    less only where a width is summed up into something that does not grow."""
    r_in, r_out = _ratios(spec)
    if not spec.inputs:
        return 1.0
    own = OUT_GAIN if {"vocab", "router"} & set(spec.axes) else 1.0
    return own * min(1.0, math.sqrt(r_out / r_in))


def adam_rate(spec: Spec) -> float:
    """An update's entries are of the rate's size and agree with the input: over fan-in."""
    return 1 / _ratios(spec)[0]


def muon_rate(spec: Spec) -> float:
    """An update's norm is 0.2 sqrt(max(fan_in, fan_out)) (optim.py), and is to be as
    sqrt(fan_out / fan_in)."""

    def wanted(s: Spec) -> float:
        return math.sqrt(s.fan_out / s.fan_in) / math.sqrt(max(s.fan_in, s.fan_out))

    return wanted(spec) / wanted(spec.tuned)


def epsilon(spec: Spec) -> float:
    """Gradients shrink as outputs grow in number, and by the residual branch's scale."""
    return 1 / (_ratios(spec)[1] * spec.depth)


# Of the model


def depth_ratio(cfg: ModelConfig) -> float:
    return 1.0 if cfg.transfer is None else cfg.n_layers / cfg.transfer.n_layers


def residual_scale(cfg: ModelConfig) -> float:
    """Of what a block adds to the residual stream."""
    return 1 / depth_ratio(cfg)


def residual_gain(cfg: ModelConfig) -> float:
    """Of a branch's last matrix: 1 / sqrt(2 layers) (GPT-2, section 2.3: branches add up), of the
    layers that it was tuned with."""
    layers = cfg.n_layers if cfg.transfer is None else cfg.transfer.n_layers
    return 1 / math.sqrt(2 * layers)


def attention_scale(cfg: ModelConfig) -> float:
    """What scores are multiplied by beside 1 / sqrt(head width): they are sums over a head whose
    queries and keys come to agree."""
    base = cfg.transfer
    if base is None:
        return 1.0
    if cfg.mla is None or base.mla is None:
        return math.sqrt(base.d_head / cfg.d_head)
    here, there = (m.d_nope + m.d_rope for m in (cfg.mla, base.mla))
    return math.sqrt(there / here)


def auxiliary_scale(cfg: ModelConfig) -> float:
    """Of the routers' load-balance and z-losses, which are sums over layers: what the main loss
    says to a router comes through a residual branch and falls with depth, so these have to too.
    Found by jaxmoe.coordinates: without it routers move 1.6 times as much at 8 times the depth."""
    return 1 / depth_ratio(cfg)


def embedding_gain(cfg: ModelConfig) -> float:
    """Rows are looked up, not multiplied: unit variance enters the residual stream. Tied to the
    head they are multiplied too, and are drawn as the head is, in the base."""
    width = cfg.d_model if cfg.transfer is None else cfg.transfer.d_model
    return width**-0.5 if cfg.tie_embeddings else 1.0


def tied_scale(cfg: ModelConfig) -> float:
    """Of a tied embedding where it is the head."""
    return 1.0 if cfg.transfer is None else cfg.transfer.d_model / cfg.d_model


# Of a run


def weight_decay(lr: float, steps: int, timescale: float) -> float:
    """optim.weight_decay for which weights are a mean over the last `timescale` of the run's
    updates: 1 / (lr * decay) steps (Wang and Aitchison 2024, arXiv:2405.13698, section 2). Its
    optimum depends on tokens per parameter alone, about 0.2 at 20 (Bergsma et al. 2025,
    arXiv:2505.13738, eq. 5)."""
    return 1 / (lr * timescale * steps)
