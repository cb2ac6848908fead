"""The language model: embedding, layers, final norm, head; the loss; multi-token prediction."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe import transfer
from jaxmoe.config import MeshConfig, ModelConfig
from jaxmoe.context import collected, spread
from jaxmoe.kernels.cross_entropy import LossSums, cross_entropy, soft_capped
from jaxmoe.mesh import from_stream, gather, over_replicas, to_stream, tokens
from jaxmoe.model.attention import Places
from jaxmoe.model.norm import rms_norm, rms_norm_specs
from jaxmoe.model.rope import make_turns
from jaxmoe.model.router import RouterStats, RouterSums, balanced
from jaxmoe.model.stack import (
    Kind,
    Layer,
    Stats,
    in_order,
    layer_specs,
    layers_specs,
    run_layer,
    run_layers,
)
from jaxmoe.spec import Spec

Array = jax.Array


@struct.dataclass
class Mtp:
    """Predicts one token further (DeepSeek-V3, arXiv:2412.19437, section 2.2); embedding and head
    are the main model's."""

    embed_norm_D: Any
    hidden_norm_D: Any
    wembed_DD: Any
    whidden_DD: Any
    layer: Layer
    final_norm_D: Any


@struct.dataclass
class Lm:
    embed_VD: Any
    layers: Any  # by segment and layer of its period, stacked on a leading dim R (stack.py)
    final_norm_D: Any
    head_DV: Any  # None where the embedding is tied to it
    mtp: tuple[Mtp, ...]


@struct.dataclass
class LmStats:
    """Beside the loss."""

    router: RouterStats | None  # of all layers with experts, on a leading dim X; None without
    mtp_nll: Array  # [n_mtp], nats per token
    by_segment: Stats  # the same as `router`, as the parameters are stacked; MTP modules last


@struct.dataclass
class Denominators:
    """What a batch's sums are divided by; no parameter changes them."""

    weight: Array  # of the loss
    tokens: Array  # that count in the router's statistics
    mtp: Array  # [n_mtp], weights of the further tokens


def lm_specs(cfg: ModelConfig) -> Lm:
    """All parameters; with `transfer` each knows its sizes in the model that rates are from."""
    if cfg.transfer is None:
        return _lm_specs(cfg)
    return transfer.with_base(_lm_specs(cfg), _lm_specs(transfer.base_model(cfg)))


def _lm_specs(cfg: ModelConfig) -> Lm:
    v, d = cfg.vocab_size, cfg.d_model
    gain = transfer.embedding_gain(cfg)
    head = Spec(shape=(d, v), axes=("embed", "vocab"), inputs=("embed",))
    return Lm(
        embed_VD=Spec(shape=(v, d), axes=("vocab", "embed"), inputs=(), gain=gain),
        layers=layers_specs(cfg),
        final_norm_D=rms_norm_specs(d),
        head_DV=None if cfg.tie_embeddings else head,
        mtp=tuple(_mtp_specs(cfg) for _ in range(cfg.n_mtp)),
    )


def lm_loss(
    params: Lm,
    tokens_BL: Array,
    targets_BL: Array,
    weights_BL: Array,
    cfg: ModelConfig,
    documents_BL: Array | None = None,
    key: Array | None = None,
    layout: MeshConfig | None = None,
    whole: Denominators | None = None,
    sources_BY: Array | None = None,
) -> tuple[LossSums, LmStats]:
    """Loss sums over the weighted positions, and what the routers did.

    `LossSums.total` has the auxiliary losses in it, per weighted token, so that total / weight is
    what the optimiser minimises; `nll` is of the next token alone.

    Args:
        tokens_BL, targets_BL, weights_BL: in natural order, not sharded over `context`; likewise
        documents_BL: int32, rising in a row; attention stays in a document and its positions start
            at zero; 0 is padding. None: each row is one document.
        key: for the router's jitter; None: there is none (evaluation).
        layout: the pipeline's rounds and microbatches; None: one round.
        whole: of the batch that these rows are a part of. Everything that is returned is then the
            part's share: those of all parts add up to the batch's sums and means.
        sources_BY: float32, which source each sequence counts for; the loss of the next token is
            then given by source too.
    """
    places = make_places(tokens_BL, documents_BL, cfg)
    x_BLD, by_segment = hidden(params, tokens_BL, places, cfg, key, layout)
    head_DV = _head(params, cfg)

    def loss(
        x_BLD: Array, targets_BL: Array, weights_BL: Array, sources_BY: Array | None = None
    ) -> LossSums:
        sums = cross_entropy(
            x_BLD,
            head_DV,
            spread(targets_BL),
            spread(weights_BL),
            chunk=cfg.loss_chunk,
            z_coef=cfg.z_loss_coef,
            soft_cap=cfg.logit_soft_cap,
            sources_BY=sources_BY,
        )
        return over_replicas(sums)

    with jax.named_scope("loss"):
        sums = loss(x_BLD, targets_BL, weights_BL, sources_BY)
    total, nlls = sums.total, []
    weight = sums.weight if whole is None else whole.weight
    for k, module in enumerate(params.mtp, start=1):
        with jax.named_scope("mtp"):
            # From token i + k on, in the document of token i.
            ahead_BL = _ahead(targets_BL, k - 1)
            x_BLD, stats = _mtp(module, params, x_BLD, ahead_BL, places, cfg)
            weights = _ahead(weights_BL, k) * _same_document(documents_BL, k)
            further = loss(x_BLD, _ahead(targets_BL, k), weights)
        by_segment = (*by_segment, (jax.tree.map(lambda a: a[None], stats),))
        per_token = jnp.maximum(further.weight if whole is None else whole.mtp[k - 1], 1e-6)
        total += cfg.mtp_coef / cfg.n_mtp * further.total / per_token * weight
        nlls.append(further.nll / per_token)
    by_segment = over_replicas(by_segment)
    sums_of_all = in_order(by_segment)
    router = None if sums_of_all is None else sums_of_all.means(cfg)
    if whole is not None:
        share = _valid(tokens_BL, documents_BL) / jnp.maximum(whole.tokens, 1)
        router = jax.tree.map(lambda mean: mean * share, router)
    if router is not None:
        balance, z = cfg.router.load_balance_coef, cfg.router.z_coef
        auxiliary = balance * router.load_balance.sum() + z * router.router_z.sum()
        if cfg.transfer is not None:
            auxiliary *= transfer.auxiliary_scale(cfg)
        total += auxiliary * weight
    mtp_nll = jnp.stack(nlls) if nlls else jnp.zeros(0, jnp.float32)
    stats = LmStats(router=router, mtp_nll=mtp_nll, by_segment=by_segment)
    return replace(sums, total=total), stats


def denominators(
    tokens_BL: Array, weights_BL: Array, documents_BL: Array | None, cfg: ModelConfig
) -> Denominators:
    """Of a whole batch, for `lm_loss` of its parts."""
    ahead = range(1, cfg.n_mtp + 1)
    further = [(_ahead(weights_BL, k) * _same_document(documents_BL, k)).sum() for k in ahead]
    return Denominators(
        weight=over_replicas(weights_BL.sum()),
        tokens=_valid(tokens_BL, documents_BL),
        mtp=over_replicas(jnp.stack(further)) if further else jnp.zeros(0, jnp.float32),
    )


def hidden(
    params: Lm,
    tokens_BL: Array,
    places: Places,
    cfg: ModelConfig,
    key: Array | None = None,
    layout: MeshConfig | None = None,
) -> tuple[Array, Stats]:
    """Final normalised hidden states x_BLD in the compute dtype, spread as context.py says, and
    router sums by segment. tokens_BL in natural order."""
    x_BLD = embedded(params, tokens_BL, cfg)
    x_BLD, stats = run_layers(params.layers, x_BLD, places, cfg, key, layout)
    with jax.named_scope("final"):
        return from_stream(rms_norm(params.final_norm_D, x_BLD, cfg.norm_eps)), stats


def lm_logits(
    params: Lm, tokens_BL: Array, cfg: ModelConfig, documents_BL: Array | None = None
) -> Array:
    """float32 logits_BLV of the next token; all of them at one time, so for short texts only."""
    x_BLD, _ = hidden(params, tokens_BL, make_places(tokens_BL, documents_BL, cfg), cfg)
    return logits(params, collected(x_BLD), cfg)


def mtp_logits(params: Lm, tokens_BL: Array, cfg: ModelConfig) -> list[Array]:
    """Of each MTP module k: float32 [B, L - k, V], at i of token i + k + 1."""
    places = make_places(tokens_BL, None, cfg)
    x_BLD, _ = hidden(params, tokens_BL, places, cfg)
    found = []
    for k, module in enumerate(params.mtp, start=1):
        x_BLD, _ = _mtp(module, params, x_BLD, _ahead(tokens_BL, k), places, cfg)
        found.append(logits(params, collected(x_BLD), cfg)[:, :-k])
    return found


def move_balance_bias(params: Lm, stats: LmStats, cfg: ModelConfig) -> Lm:
    """Parameters after the step's loads have moved the bias of each router, where there is one."""
    rate = cfg.router.balance_bias_rate
    if not rate:
        return params

    def one(layer: Layer, of_layer: RouterSums | None) -> Layer:
        if of_layer is None:
            return layer
        # [R, E], where the parameters may be [rounds, R / rounds, E].
        load = of_layer.means(cfg).load_E.reshape(layer.ffn.router.balance_bias_E.shape)
        router = balanced(layer.ffn.router, load, rate)
        return replace(layer, ffn=replace(layer.ffn, router=router))

    n = len(params.layers)
    layers = tuple(
        tuple(one(*pair) for pair in zip(layers, of_segment, strict=True))
        for layers, of_segment in zip(params.layers, stats.by_segment[:n], strict=True)
    )
    modules = tuple(
        replace(module, layer=one(module.layer, jax.tree.map(lambda a: a[0], of_module)))
        for module, (of_module,) in zip(params.mtp, stats.by_segment[n:], strict=True)
    )
    return replace(params, layers=layers, mtp=modules)


def make_places(tokens_BL: Array, documents_BL: Array | None, cfg: ModelConfig) -> Places:
    """Of tokens and documents in natural order."""
    positions_bL = spread(positions(tokens_BL, documents_BL))
    turns = make_turns(positions_bL, cfg.rope, cfg.rotary_width)
    return Places(turns=turns, documents_BL=None if documents_BL is None else spread(documents_BL))


def positions(tokens_BL: Array, documents_BL: Array | None) -> Array:
    """int32 [b, L]: from 0 in each row (b = 1), or in each document of it."""
    steps_1L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
    if documents_BL is None:
        return steps_1L
    starts_BL = jnp.concatenate(
        [jnp.ones_like(documents_BL[:, :1]), jnp.diff(documents_BL, axis=1)], axis=1
    )
    first_BL = jax.lax.cummax(jnp.where(starts_BL != 0, steps_1L, 0), axis=1)
    return steps_1L - first_BL


def look_up(embed_VD: Array, tokens_BL: Array) -> Array:
    """Rows of a table whose V is sharded over `model`: each shard gives its own, the rest zeros."""

    def local(embed_vD: Array, tokens_bl: Array) -> Array:
        first = jax.lax.axis_index("model") * len(embed_vD)
        here = tokens_bl - first
        mine = (here >= 0) & (here < len(embed_vD))
        rows_blD = embed_vD.at[jnp.where(mine, here, 0)].get(mode="clip")
        return jax.lax.psum(jnp.where(mine[..., None], rows_blD, 0), "model")

    return jax.shard_map(local, in_specs=(P("model", None), tokens()), out_specs=tokens(None))(
        embed_VD, tokens_BL
    )


def embedded(params: Lm, tokens_BL: Array, cfg: ModelConfig) -> Array:
    """What enters the residual stream, in the compute dtype."""
    embed_VD = gather(params.embed_VD, lm_specs(cfg).embed_VD, jnp.dtype(cfg.dtype))
    with jax.named_scope("embed"):
        return to_stream(look_up(embed_VD, spread(tokens_BL)))


@jax.named_scope("head")
def _head(params: Lm, cfg: ModelConfig) -> Array:
    specs, dtype = lm_specs(cfg), jnp.dtype(cfg.dtype)
    if cfg.tie_embeddings:
        head_DV = gather(params.embed_VD, specs.embed_VD, dtype).T
        return head_DV if cfg.transfer is None else head_DV * transfer.tied_scale(cfg)
    return gather(params.head_DV, specs.head_DV, dtype)


def logits(params: Lm, x_BLD: Array, cfg: ModelConfig) -> Array:
    """float32, of final hidden states in natural order."""
    logits_BLV = jnp.einsum(
        "BLD,DV->BLV", x_BLD, _head(params, cfg), preferred_element_type=jnp.float32
    )
    return soft_capped(logits_BLV, cfg.logit_soft_cap)


# Multi-token prediction


def _mtp_kind(cfg: ModelConfig) -> Kind:
    return Kind(moe=not cfg.is_dense, window=cfg.sliding_window)


def _mtp_specs(cfg: ModelConfig) -> Mtp:
    d = cfg.d_model
    norm = rms_norm_specs(d)
    # Both parts of one [2 D, D] matrix: fan-in is half of what is added up.
    half = Spec(shape=(d, d), axes=("embed", "out_embed"), inputs=("embed",), gain=0.5**0.5)
    return Mtp(
        embed_norm_D=norm,
        hidden_norm_D=norm,
        wembed_DD=half,
        whidden_DD=half,
        layer=layer_specs(cfg, _mtp_kind(cfg)),
        final_norm_D=norm,
    )


def _mtp(
    module: Mtp, params: Lm, x_BLD: Array, ahead_BL: Array, places: Places, cfg: ModelConfig
) -> tuple[Array, RouterSums | None]:
    """Normalised hidden states one token further: from those before and the tokens ahead."""
    specs, dtype = _mtp_specs(cfg), jnp.dtype(cfg.dtype)
    norm = partial(rms_norm, eps=cfg.norm_eps)
    e_BLD = norm(module.embed_norm_D, embedded(params, ahead_BL, cfg))
    h_BLD = norm(module.hidden_norm_D, to_stream(x_BLD))
    wembed_DD = gather(module.wembed_DD, specs.wembed_DD, dtype)
    whidden_DD = gather(module.whidden_DD, specs.whidden_DD, dtype)
    x_BLD = jnp.einsum("BLD,DX->BLX", e_BLD, wembed_DD)
    x_BLD += jnp.einsum("BLD,DX->BLX", h_BLD, whidden_DD)
    x_BLD, stats = run_layer(module.layer, x_BLD, places, cfg, _mtp_kind(cfg))
    return from_stream(norm(module.final_norm_D, x_BLD)), stats


def _ahead(a_BL: Array, k: int) -> Array:
    """What stands k positions later in the row; zeros at its end."""
    if k == 0:
        return a_BL
    return jnp.concatenate([a_BL[:, k:], jnp.zeros_like(a_BL[:, :k])], axis=1)


def _same_document(documents_BL: Array | None, k: int) -> Array | float:
    if documents_BL is None:
        return 1.0
    return (_ahead(documents_BL, k) == documents_BL).astype(jnp.float32)


def _valid(tokens_BL: Array, documents_BL: Array | None) -> Array:
    """How many tokens are no padding."""
    if documents_BL is None:
        return over_replicas(jnp.float32(tokens_BL.size))
    return over_replicas((documents_BL > 0).astype(jnp.float32).sum())
