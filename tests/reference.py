"""The model once more, as plainly as it can be said, for the fast one to agree with.

No mesh, no chunks, no dispatch, no scan: full scores, full logits, every expert for every token,
float32 throughout. Nothing here comes from jaxmoe but the containers of the parameters and the
config: which layer is of which kind, the rotary frequencies and every loss are said again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ModelConfig, RopeConfig

Array = jax.Array
plain = jax.numpy_rank_promotion("allow")


def assert_close(got: Any, want: Any, tolerance: float = 1e-5, name: str = "") -> None:
    """|got - want| <= tolerance * max|want|, over a whole tensor."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (name, got.shape, want.shape)
    worst, size = np.abs(got - want).max(), np.abs(want).max()
    assert size > 0, f"{name}: the reference is all zeros, so this compares nothing"
    assert worst <= tolerance * size, f"{name}: off by {worst:.3g} of {size:.3g}"


@plain
def rms_norm(scale: Array, x: Array, eps: float) -> Array:
    """Over as many of the last dims as `scale` has."""
    dims = tuple(range(-scale.ndim, 0))
    return x / jnp.sqrt((x**2).mean(dims, keepdims=True) + eps) * scale


# Positions


def frequencies(r: RopeConfig, width: int) -> np.ndarray:
    """Radians a position of each pair, float64, one pair after another."""
    pairs = width // 2
    plain_h = np.array([r.theta ** (-2 * h / width) for h in range(pairs)])
    if r.scaling == "none":
        return plain_h
    if r.scaling == "linear":  # position interpolation: as if positions were closer together
        return plain_h / r.factor
    if r.scaling == "ntk":  # the base for which the last pair turns `factor` times more slowly
        base = (r.factor * r.theta ** ((width - 2) / width)) ** (width / (width - 2))
        return np.array([base ** (-2 * h / width) for h in range(pairs)])
    turns_h = r.original_length * plain_h / (2 * math.pi)  # over the length trained on
    if r.scaling == "llama3":
        keep = [(t - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor) for t in turns_h]
    else:
        # The pair, as a real number, that turns n times: log(turns) falls linearly with the pair.
        slope, start = -2 * math.log(r.theta) / width, math.log(r.original_length / (2 * math.pi))
        low, high = ((math.log(n) - start) / slope for n in (r.beta_fast, r.beta_slow))
        if r.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        keep = [1 - (h - low) / max(high - low, 1e-3) for h in range(pairs)]
    keep_h = np.array([min(1.0, max(0.0, k)) for k in keep])
    return keep_h * plain_h + (1 - keep_h) * plain_h / r.factor


def sharpening(r: RopeConfig) -> tuple[float, float]:
    """What rotated parts are multiplied by, and scores are multiplied by; 1 but in yarn."""

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(r.factor) + 1 if r.factor > 1 else 1.0

    if r.scaling != "yarn":
        return 1.0, 1.0
    both = bool(r.mscale and r.mscale_all_dim)
    of_parts = m(r.mscale or 0) / m(r.mscale_all_dim or 0) if both else m(1)
    if r.attention_factor is not None:
        of_parts = r.attention_factor
    return of_parts, m(r.mscale_all_dim) ** 2 if r.mscale_all_dim else 1.0


@plain
def rope(x_BLNH: Array, positions_BL: Any, r: RopeConfig) -> Array:
    """Pairs as complex numbers, turned by exp(i * position * frequency)."""
    h = x_BLNH.shape[-1]
    pairs = x_BLNH[..., : h // 2] + 1j * x_BLNH[..., h // 2 :]
    angle = jnp.asarray(positions_BL)[..., None] * jnp.asarray(frequencies(r, h), jnp.float32)
    turned = sharpening(r)[0] * pairs * jnp.exp(1j * angle)[:, :, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def positions(documents_BL: Any, b: int, length: int) -> np.ndarray:
    """From 0 in each row, or in each document of it; in plain Python."""
    if documents_BL is None:
        return np.tile(np.arange(length), (b, 1))
    out = np.zeros((b, length), np.int64)
    for row, documents in enumerate(np.asarray(documents_BL)):
        for i in range(1, length):
            out[row, i] = out[row, i - 1] + 1 if documents[i] == documents[i - 1] else 0
    return out


# Attention


@plain
def causal_attention(
    q_BLNH: Array,
    k_BMKH: Array,
    v_BMKU: Array,
    documents_BL: Any = None,
    sinks_N: Any = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    b, length, n, _ = q_BLNH.shape
    groups = n // k_BMKH.shape[2]
    k_BMNH, v_BMNU = (jnp.repeat(a, groups, axis=2) for a in (k_BMKH, v_BMKU))
    scores = jnp.einsum("BLNH,BMNH->BNLM", q_BLNH, k_BMNH) * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    seen = np.zeros((b, length, length), bool)
    for i in range(length):
        first = 0 if window is None else max(0, i + 1 - window)
        seen[:, i, first : i + 1] = True
    if documents_BL is not None:
        documents = np.asarray(documents_BL)
        seen &= documents[:, :, None] == documents[:, None, :]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks_N is not None:  # one more key, whose value is zero
        sink = jnp.broadcast_to(sinks_N[None, :, None, None], (b, n, length, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
        v_BMNU = jnp.concatenate([v_BMNU, jnp.zeros_like(v_BMNU[:, :1])], axis=1)
    return jnp.einsum("BNLM,BMNU->BLNU", jax.nn.softmax(scores, axis=-1), v_BMNU)


@plain
def attention(
    p: Any, x: Array, cfg: ModelConfig, window: int | None = None, documents_BL: Any = None
) -> Array:
    where = positions(documents_BL, *x.shape[:2])

    def turned(a: Array) -> Array:
        return rope(a, where, cfg.rope)

    if cfg.mla is None:
        if cfg.qk_norm != "none":  # over all heads at once, or each head alone
            dims = {"full": (cfg.n_heads, cfg.d_head), "per_head": (cfg.d_head,)}[cfg.qk_norm]
            assert p.q_norm.shape == dims, p.q_norm.shape
        q = jnp.einsum("BLD,DNH->BLNH", x, p.wq_DNH)
        k = jnp.einsum("BLD,DKH->BLKH", x, p.wk_DKH)
        v = jnp.einsum("BLD,DKH->BLKH", x, p.wv_DKH)
        if cfg.attention_bias:
            q, k, v = q + p.bq_NH, k + p.bk_KH, v + p.bv_KH
        if cfg.qk_norm != "none":
            q, k = rms_norm(p.q_norm, q, cfg.norm_eps), rms_norm(p.k_norm, k, cfg.norm_eps)
        q, k, wo = turned(q), turned(k), p.wo_NHD
    else:
        i = cfg.mla.d_nope
        latent = x
        if cfg.mla.q_rank:
            latent = rms_norm(p.q_norm_Q, x @ p.wqa_DQ, cfg.norm_eps)
        q = jnp.einsum("BLQ,QNH->BLNH", latent, p.wq_QNH)
        q = jnp.concatenate([q[..., :i], turned(q[..., i:])], axis=-1)
        latent = rms_norm(p.kv_norm_J, x @ p.wkva_DJ, cfg.norm_eps)
        k = jnp.einsum("BLJ,JNI->BLNI", latent, p.wk_JNI)
        shared = turned((x @ p.wkr_DW)[:, :, None])
        k = jnp.concatenate([k, jnp.repeat(shared, cfg.n_heads, axis=2)], axis=-1)
        v, wo = jnp.einsum("BLJ,JNU->BLNU", latent, p.wv_JNU), p.wo_NUD
    scale = sharpening(cfg.rope)[1] / math.sqrt(q.shape[-1])
    options = {"scale": scale, "window": window, "soft_cap": cfg.attention_soft_cap}
    o = causal_attention(q, k, v, documents_BL, p.sinks_N, **options)
    y = jnp.einsum("BLNU,NUD->BLD", o, wo)
    return y + p.bo_D if cfg.attention_bias else y


# Feed-forward


def activate(gate: Array, up: Array, cfg: ModelConfig) -> Array:
    if cfg.activation == "swiglu":
        return gate / (1 + jnp.exp(-gate)) * up
    gate = jnp.where(gate > cfg.swiglu_limit, cfg.swiglu_limit, gate)
    up = jnp.maximum(-cfg.swiglu_limit, jnp.where(up > cfg.swiglu_limit, cfg.swiglu_limit, up))
    return gate / (1 + jnp.exp(-cfg.swiglu_alpha * gate)) * (1 + up)


@plain
def experts(x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Any, cfg: ModelConfig) -> Array:
    """Every expert for every token, then the chosen ones' weighted sum."""
    share_BLE = (jax.nn.one_hot(ids_BLA, len(w.wgate_EDF)) * weights_BLA[..., None]).sum(-2)
    gate = jnp.einsum("BLD,EDF->BLEF", x_BLD, w.wgate_EDF)
    up = jnp.einsum("BLD,EDF->BLEF", x_BLD, w.wup_EDF)
    if cfg.expert_bias:
        gate, up = gate + w.bgate_EF, up + w.bup_EF
    y_BLED = jnp.einsum("BLEF,EFD->BLED", activate(gate, up, cfg), w.wdown_EFD)
    if cfg.expert_bias:
        y_BLED += w.bdown_ED
    return jnp.einsum("BLE,BLED->BLD", share_BLE, y_BLED)


@plain
def choose(p: Any, x_BLD: Array, cfg: ModelConfig) -> tuple[Array, Array, Array, Array]:
    """weights_BLA, ids_BLA, and the logits and the distribution they came from."""
    r, e = cfg.router, cfg.n_experts
    logits = x_BLD @ p.w_DE
    if r.bias:
        logits += p.bias_E
    if r.score == "softmax":
        scores = probs = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + jnp.exp(-logits))
        probs = scores / scores.sum(-1, keepdims=True)
    worth = scores
    if r.balance_bias_rate is not None:
        worth = worth + p.balance_bias_E
    groups = worth.reshape(*worth.shape[:2], r.n_groups, e // r.n_groups)
    of_group = jnp.sort(groups, axis=-1)[..., -2:].sum(-1)
    rank = jnp.argsort(jnp.argsort(-of_group, axis=-1), axis=-1)
    is_open = jnp.repeat(rank < r.top_k_groups, e // r.n_groups, axis=-1)
    ids = jnp.argsort(jnp.where(is_open, -worth, jnp.inf), axis=-1)[..., : cfg.top_k]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if r.norm_top_k:
        weights = weights / weights.sum(-1, keepdims=True)
    return r.scale * weights, ids, logits, probs


@plain
def moe(p: Any, x_BLD: Array, cfg: ModelConfig, valid_BL: Any = None) -> tuple[Array, dict]:
    """The output; loads, the load-balance loss and the router's z-loss, without the padding."""
    weights, ids, logits, probs = choose(p.router, x_BLD, cfg)
    y = experts(x_BLD, weights, ids, p.experts, cfg)
    if cfg.n_shared_experts:
        y += ffn(p.shared, x_BLD, cfg)
    valid = jnp.ones(ids.shape[:2]) if valid_BL is None else jnp.asarray(valid_BL, jnp.float32)
    counts_BE = jnp.stack(
        [((ids == e).any(-1) * valid).sum(1) for e in range(cfg.n_experts)], axis=-1
    )
    sums_BE, n_B = (probs * valid[..., None]).sum(1), valid.sum(1)

    def balance(counts_E: Array, sums_E: Array, n: Array) -> Array:
        """E * sum of an expert's share of all choices times its mean probability."""
        return cfg.n_experts * (counts_E / (n * cfg.top_k) * sums_E / n).sum(-1)

    if cfg.router.load_balance_scope == "sequence":
        n_B1 = jnp.maximum(n_B, 1)[:, None]
        loss = (balance(counts_BE, sums_BE, n_B1) * n_B).sum() / n_B.sum()
    else:  # one device: the microbatch is the batch
        loss = balance(counts_BE.sum(0), sums_BE.sum(0), n_B.sum())
    z = jnp.log(jnp.exp(logits).sum(-1)) ** 2
    stats = {
        "load_E": counts_BE.sum(0) / counts_BE.sum() * cfg.n_experts,
        "load_balance": loss,
        "router_z": (z * valid).sum() / valid.sum(),
    }
    return y, stats


@plain
def ffn(p: Any, x_BLD: Array, cfg: ModelConfig) -> Array:
    return activate(x_BLD @ p.wgate_DF, x_BLD @ p.wup_DF, cfg) @ p.wdown_FD


# The model


@plain
def cross_entropy(
    x_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    z_coef: float,
    soft_cap: float | None = None,
) -> tuple[Array, Array, Array]:
    """Weighted sums: total, nll, squared logsumexp."""
    logits = jnp.einsum("BLD,DV->BLV", x_BLD, head_DV)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    lse = jnp.log(jnp.exp(logits).sum(-1))
    target = jnp.take_along_axis(logits, targets_BL[..., None], axis=-1)[..., 0]
    nll, z = ((lse - target) * weights_BL).sum(), (lse**2 * weights_BL).sum()
    return nll + z_coef * z, nll, z


def has_experts(i: int, cfg: ModelConfig) -> bool:
    """DeepSeek's leading dense layers, then the last of every `moe_every`."""
    if cfg.n_experts == 1 or i < cfg.first_dense:
        return False
    return (i - cfg.first_dense) % cfg.moe_every == cfg.moe_every - 1


def window_of(i: int, cfg: ModelConfig) -> int | None:
    last_of_its_period = cfg.global_every and i % cfg.global_every == cfg.global_every - 1
    return None if last_of_its_period else cfg.sliding_window


def unstacked(layers: Any) -> list[Any]:
    """The parameters of each layer, in order."""
    out = []
    for of_segment in layers:
        for repeat in range(len(of_segment[0].ffn_norm_D)):
            out += [jax.tree.map(lambda a, r=repeat: a[r], layer) for layer in of_segment]
    return out


@plain
def layer(
    p: Any, x: Array, cfg: ModelConfig, window: int | None, sparse: bool, documents_BL: Any
) -> tuple[Array, dict | None]:
    normed = rms_norm(p.attention_norm_D, x, cfg.norm_eps)
    x = x + attention(p.attention, normed, cfg, window, documents_BL)
    normed = rms_norm(p.ffn_norm_D, x, cfg.norm_eps)
    if not sparse:
        return x + ffn(p.ffn, normed, cfg), None
    y, stats = moe(p.ffn, normed, cfg, None if documents_BL is None else documents_BL > 0)
    return x + y, stats


@plain
def objective(
    p: Any, tokens: Any, weights_BL: Any, cfg: ModelConfig, documents_BL: Any = None
) -> tuple[Array, dict]:
    """What the optimiser minimises (per weighted token, auxiliary losses and all); its parts.

    `tokens` [B, L + 1]: position i sees tokens 0 .. i and is asked for token i + 1.
    """
    length = weights_BL.shape[1]
    head = p.embed_VD.T if cfg.tie_embeddings else p.head_DV
    loss = {"z_coef": cfg.z_loss_coef, "soft_cap": cfg.logit_soft_cap}
    x, routers = p.embed_VD[tokens[:, :length]], []
    for i, at in enumerate(unstacked(p.layers)):
        x, stats = layer(at, x, cfg, window_of(i, cfg), has_experts(i, cfg), documents_BL)
        routers += [stats] if stats else []
    x = rms_norm(p.final_norm_D, x, cfg.norm_eps)
    total, nll, _ = cross_entropy(x, head, tokens[:, 1 : length + 1], weights_BL, **loss)
    value, mtp = total / weights_BL.sum(), []
    # Token t_(i + k + 1) from h_(k - 1) at i and t_(i + k), which is 0 where the row has ended.
    padded = jnp.pad(tokens, ((0, 0), (0, cfg.n_mtp)))
    for k, module in enumerate(p.mtp, start=1):
        ahead = rms_norm(module.embed_norm_D, p.embed_VD[padded[:, k : length + k]], cfg.norm_eps)
        x = rms_norm(module.hidden_norm_D, x, cfg.norm_eps)
        both = jnp.concatenate([module.wembed_DD, module.whidden_DD])
        x = jnp.concatenate([ahead, x], axis=-1) @ both
        sparse = cfg.n_experts > 1
        x, stats = layer(module.layer, x, cfg, cfg.sliding_window, sparse, documents_BL)
        routers += [stats] if stats else []
        x = rms_norm(module.final_norm_D, x, cfg.norm_eps)
        asked = weights_BL[:, k:]  # all positions from i on to the target are in one document
        if documents_BL is not None:
            asked = asked * (documents_BL[:, k:] == documents_BL[:, :-k])
        targets = tokens[:, k + 1 : length + 1]
        total, of_mtp, _ = cross_entropy(x[:, : length - k], head, targets, asked, **loss)
        value += cfg.mtp_coef / cfg.n_mtp * total / asked.sum()
        mtp.append(of_mtp / asked.sum())
    for stats in routers:
        value += cfg.router.load_balance_coef * stats["load_balance"]
        value += cfg.router.z_coef * stats["router_z"]
    return value, {"nll": nll, "mtp_nll": mtp, "routers": routers}


def loss(p: Any, tokens: Any, weights_BL: Any, cfg: ModelConfig) -> Array:
    return objective(p, tokens, weights_BL, cfg)[0]
