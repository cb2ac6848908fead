"""Which experts a token goes to, with what weights; the losses and the bias that even them out."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ModelConfig, RouterConfig
from jaxmoe.context import spread
from jaxmoe.mesh import batch, beside, replica
from jaxmoe.model.remat import CHOICE, named
from jaxmoe.spec import Spec

Array = jax.Array


@struct.dataclass
class Router:
    w_DE: Any
    bias_E: Any  # on the logits; None without
    balance_bias_E: Any  # on the choice only, no gradient: moved by `balanced`; None without


@struct.dataclass
class RouterStats:
    """What the router did to a batch, of one layer; reduced over the whole global batch."""

    load_E: Array  # share of the rows that went to each expert, times E: 1 is balanced
    load_balance: Array  # auxiliary loss, 1 is balanced
    router_z: Array  # mean of logsumexp^2 of the router's logits
    bias_low: Array  # of balance_bias_E; 0 without
    bias_high: Array
    # Share of the passes in which the first size of the experts' buffers did not suffice (moe.py).
    overflow: Array


@struct.dataclass
class RouterSums:
    """What adds up over the parts of a batch, of one layer or a stack; `means` gives the stats.

    The gradient of the load-balance loss and the z-loss goes through the sums.
    """

    load_E: Array  # as RouterStats has it, times rows
    probs_E: Array  # probabilities, summed over the rows
    balance: Array  # the load-balance losses of sequences or devices times their rows
    router_z: Array
    rows: Array  # valid tokens
    bias_low: Array  # of each pass, the same in all of them
    bias_high: Array
    overflow: Array
    passes: Array  # parts and replicas added up

    def means(self, cfg: ModelConfig) -> RouterStats:
        """Of the whole batch: the load-balance loss of scope "global" is not the mean of parts."""
        rows = jnp.maximum(self.rows, 1)
        balance = self.balance
        if cfg.router.load_balance_scope == "global":
            balance = (self.load_E * self.probs_E).sum(-1) / rows
        return RouterStats(
            load_E=self.load_E / rows[..., None],
            load_balance=balance / rows,
            router_z=self.router_z / rows,
            bias_low=self.bias_low / self.passes,
            bias_high=self.bias_high / self.passes,
            overflow=self.overflow / self.passes,
        )


def router_specs(cfg: ModelConfig) -> Router:
    d, e, r = cfg.d_model, cfg.n_experts, cfg.router
    vector = Spec(shape=(e,), axes=("router",), init="zeros", cast=False)
    return Router(
        w_DE=Spec(shape=(d, e), axes=("embed", "router"), inputs=("embed",), cast=False),
        bias_E=vector if r.bias else None,
        balance_bias_E=None if r.balance_bias_rate is None else vector,
    )


def route(
    params: Router,
    x_BLD: Array,
    cfg: ModelConfig,
    valid_BL: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Array, RouterSums]:
    """Scores in float32, the choice of the top k, and their weights.

    Args:
        valid_BL: bool; padding is routed too, but counts in no statistic. None: all are valid.
        key: for the jitter; None: there is none (evaluation).

    Returns:
        weights_BLA float32, ids_BLA int32, and the sums that stats come from. The load-balance loss
        is that of Switch Transformer (arXiv:2101.03961, eq. 4), over what `load_balance_scope`
        says; the z-loss that of ST-MoE (arXiv:2202.08906, eq. 5).
    """
    r = cfg.router
    x_BLD = _jittered(x_BLD.astype(jnp.float32), r.jitter, key)
    logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, params.w_DE)
    if params.bias_E is not None:
        logits_BLE += params.bias_E[None, None]
    scores_BLE, probs_BLE = _scores(logits_BLE, r)
    # Kept: small, and a choice among many experts is dear to make again.
    ids_BLA = named(_choose(scores_BLE, params.balance_bias_E, cfg), CHOICE)
    weights_BLA = _weights(scores_BLE, ids_BLA, r)
    sums = _sums(params, logits_BLE, probs_BLE, ids_BLA, valid_BL, cfg)
    return weights_BLA, ids_BLA, sums


def balanced(params: Router, load: Array, rate: float) -> Router:
    """The bias goes up for experts with less than their share, down for those with more
    (Wang et al., arXiv:2408.15664, algorithm 1). `load` is [E], or [R, E] for a stack."""
    return replace(
        params, balance_bias_E=params.balance_bias_E + jnp.float32(rate) * jnp.sign(1 - load)
    )


def _jittered(x_BLD: Array, jitter: float, key: Array | None) -> Array:
    """Switch Transformer, section 2.4: the same noise on every layout, hence drawn by position."""
    if not jitter or key is None:
        return x_BLD
    b, length, width = x_BLD.shape
    places = jnp.arange(b * length, dtype=jnp.int32).reshape(b, length)
    own = replica()
    if own is not None:  # after the rows of those before
        places += own * b * length
    places_BL = beside(spread(places), x_BLD)

    def draw(place: Array) -> Array:
        own = jax.random.fold_in(key, place)
        return jax.random.uniform(own, (width,), jnp.float32, 1 - jitter, 1 + jitter)

    return x_BLD * jax.vmap(jax.vmap(draw))(places_BL)


def _scores(logits_BLE: Array, r: RouterConfig) -> tuple[Array, Array]:
    """Scores to choose and weigh by, and the same as a distribution for the auxiliary loss
    (DeepSeek-V3, arXiv:2412.19437, eq. 19)."""
    if r.score == "softmax":
        probs_BLE = jax.nn.softmax(logits_BLE, axis=-1)
        return probs_BLE, probs_BLE
    scores_BLE = jax.nn.sigmoid(logits_BLE)
    return scores_BLE, scores_BLE / (scores_BLE.sum(-1, keepdims=True) + 1e-20)


def _choose(scores_BLE: Array, bias_E: Array | None, cfg: ModelConfig) -> Array:
    """int32 ids of the top k, of the best groups only where there are groups."""
    r = cfg.router
    choice_BLE = jax.lax.stop_gradient(scores_BLE)
    if bias_E is not None:
        choice_BLE += jax.lax.stop_gradient(bias_E)[None, None]
    if r.top_k_groups < r.n_groups:
        choice_BLPO = choice_BLE.reshape(*choice_BLE.shape[:2], r.n_groups, -1)
        best_BLP = jax.lax.top_k(choice_BLPO, 2)[0].sum(-1)
        _, groups_BLp = jax.lax.top_k(best_BLP, r.top_k_groups)
        open_BLP = jax.nn.one_hot(groups_BLp, r.n_groups, dtype=jnp.bool_).any(-2)
        choice_BLPO = jnp.where(open_BLP[..., None], choice_BLPO, -jnp.inf)
        choice_BLE = choice_BLPO.reshape(choice_BLE.shape)
    return jax.lax.top_k(choice_BLE, cfg.top_k)[1].astype(jnp.int32)


def _weights(scores_BLE: Array, ids_BLA: Array, r: RouterConfig) -> Array:
    weights_BLA = jnp.take_along_axis(scores_BLE, ids_BLA, axis=-1)
    if r.norm_top_k:
        weights_BLA = weights_BLA / (weights_BLA.sum(-1, keepdims=True) + 1e-20)
    return weights_BLA if r.scale == 1 else weights_BLA * r.scale


def _sums(
    params: Router,
    logits_BLE: Array,
    probs_BLE: Array,
    ids_BLA: Array,
    valid_BL: Array | None,
    cfg: ModelConfig,
) -> RouterSums:
    chosen_BLE = jax.nn.one_hot(ids_BLA, cfg.n_experts, dtype=jnp.float32).sum(-2)
    chosen_BLE *= cfg.n_experts / cfg.top_k
    z_BL = jax.nn.logsumexp(logits_BLE, axis=-1) ** 2
    if valid_BL is None:
        valid_BL = jnp.ones_like(z_BL)
    else:
        valid_BL = beside(valid_BL.astype(jnp.float32), logits_BLE)
    rows_B = valid_BL.sum(1)
    # Over the whole sequence, whose positions may be on several devices.
    of_rows = P(batch(), None)
    load_BE = named(jnp.einsum("BLE,BL->BE", chosen_BLE, valid_BL, out_sharding=of_rows), CHOICE)
    probs_BE = jnp.einsum("BLE,BL->BE", probs_BLE, valid_BL, out_sharding=of_rows)
    bias_E = params.balance_bias_E
    return RouterSums(
        load_E=load_BE.sum(0),
        probs_E=probs_BE.sum(0),
        balance=_balance(load_BE, probs_BE, rows_B, cfg.router.load_balance_scope),
        router_z=(z_BL * valid_BL).sum(),
        rows=rows_B.sum(),
        bias_low=jnp.float32(0) if bias_E is None else bias_E.min(),
        bias_high=jnp.float32(0) if bias_E is None else bias_E.max(),
        overflow=jnp.float32(0),  # known later
        passes=jnp.float32(1),
    )


def _balance(load_BE: Array, probs_BE: Array, rows_B: Array, scope: str) -> Array:
    """sum_e load_e * mean probability of e, times its valid tokens; of each sequence or device,
    added up. 0 for "global", which only the sums over all parts of the batch give."""
    if scope == "global":
        return jnp.float32(0)
    if scope == "sequence":
        return ((load_BE * probs_BE).sum(-1) / jnp.maximum(rows_B, 1)).sum()

    over = batch()

    def local(load_bE: Array, probs_bE: Array, rows_b: Array) -> Array:
        load_E, probs_E, rows = load_bE.sum(0), probs_bE.sum(0), jnp.maximum(rows_b.sum(), 1)
        return jax.lax.psum((load_E * probs_E).sum() / rows, over)

    by_row = P(over, None)
    shared = jax.shard_map(local, in_specs=(by_row, by_row, P(over)), out_specs=P())
    return shared(load_BE, probs_BE, rows_B)
