"""The model once more, as plainly as it can be said, for the fast one to agree with.

No mesh, no chunks, no dispatch, no scan: full scores, full logits, every expert for every token,
float32 throughout. Nothing here comes from jaxmoe but the containers of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ModelConfig

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
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


@plain
def rope(x_BLNH: Array, theta: float) -> Array:
    """Pairs as complex numbers, turned by exp(i * position * theta^(-2j / H))."""
    h = x_BLNH.shape[-1]
    pairs = x_BLNH[..., : h // 2] + 1j * x_BLNH[..., h // 2 :]
    angle = np.arange(x_BLNH.shape[1])[:, None] * theta ** (-2 * np.arange(h // 2) / h)
    turned = pairs * np.exp(1j * angle).astype(np.complex64)[None, :, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


@plain
def causal_attention(q_BLNH: Array, k_BMKH: Array, v_BMKH: Array) -> Array:
    length, n, h = q_BLNH.shape[1:]
    groups = n // k_BMKH.shape[2]
    k_BMNH, v_BMNH = (jnp.repeat(a, groups, axis=2) for a in (k_BMKH, v_BMKH))
    scores = jnp.einsum("BLNH,BMNH->BNLM", q_BLNH, k_BMNH) / np.sqrt(h)
    scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("BNLM,BMNH->BLNH", jax.nn.softmax(scores, axis=-1), v_BMNH)


@plain
def attention(p: Any, x: Array, cfg: ModelConfig) -> Array:
    q = jnp.einsum("BLD,DNH->BLNH", x, p.wq_DNH)
    k = jnp.einsum("BLD,DKH->BLKH", x, p.wk_DKH)
    v = jnp.einsum("BLD,DKH->BLKH", x, p.wv_DKH)
    if cfg.qk_norm:
        q, k = rms_norm(p.q_norm_H, q, cfg.norm_eps), rms_norm(p.k_norm_H, k, cfg.norm_eps)
    o = causal_attention(rope(q, cfg.rope_theta), rope(k, cfg.rope_theta), v)
    return jnp.einsum("BLNH,NHD->BLD", o, p.wo_NHD)


@plain
def experts(x_BLD: Array, weights_BLA: Array, ids_BLA: Array, w: Any) -> Array:
    """Every expert for every token, then the chosen ones' weighted sum."""
    gate_EDF, up_EDF, down_EFD = w
    share_BLE = (jax.nn.one_hot(ids_BLA, len(gate_EDF)) * weights_BLA[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("BLD,EDF->BLEF", x_BLD, gate_EDF))
    hidden *= jnp.einsum("BLD,EDF->BLEF", x_BLD, up_EDF)
    return jnp.einsum("BLE,BLEF,EFD->BLD", share_BLE, hidden, down_EFD)


@plain
def moe(p: Any, x_BLD: Array, top_k: int) -> tuple[Array, Array, Array]:
    """The output, the load-balance loss and the router's z-loss."""
    logits = jnp.einsum("BLD,DE->BLE", x_BLD, p.router_DE)
    probs = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    ids = jnp.argsort(-probs, axis=-1)[..., :top_k]
    top = jnp.take_along_axis(probs, ids, axis=-1)
    y = experts(x_BLD, top / top.sum(-1, keepdims=True), ids, (p.wgate_EDF, p.wup_EDF, p.wdown_EFD))
    n_experts = probs.shape[-1]
    fraction_E = jnp.stack([(ids == e).mean() * top_k for e in range(n_experts)]) / top_k
    balance = n_experts * (fraction_E * probs.mean((0, 1))).sum()
    return y, balance, (jnp.log(jnp.exp(logits).sum(-1)) ** 2).mean()


@plain
def cross_entropy(
    x_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, z_coef: float
) -> tuple[Array, Array, Array]:
    """Weighted sums: total, nll, squared logsumexp."""
    logits = jnp.einsum("BLD,DV->BLV", x_BLD, head_DV)
    lse = jnp.log(jnp.exp(logits).sum(-1))
    target = jnp.take_along_axis(logits, targets_BL[..., None], axis=-1)[..., 0]
    nll, z = ((lse - target) * weights_BL).sum(), (lse**2 * weights_BL).sum()
    return nll + z_coef * z, nll, z


@plain
def loss(p: Any, tokens: Any, weights_BL: Any, cfg: ModelConfig) -> Array:
    """What the optimiser minimises: per weighted token, auxiliary losses and all.

    `tokens` [B, L + 1]: position i sees tokens 0 .. i and is asked for token i + 1.
    """
    length = weights_BL.shape[1]
    x = p.embed_VD[tokens[:, :length]]
    auxiliary = jnp.float32(0)
    for layer in range(cfg.n_layers):
        at = jax.tree.map(lambda a, i=layer: a[i], p.layers)
        x += attention(at.attention, rms_norm(at.attention_norm_D, x, cfg.norm_eps), cfg)
        y, balance, z = moe(at.moe, rms_norm(at.moe_norm_D, x, cfg.norm_eps), cfg.top_k)
        auxiliary += cfg.load_balance_coef * balance + cfg.router_z_coef * z
        x += y
    x = rms_norm(p.final_norm_D, x, cfg.norm_eps)
    targets = tokens[:, 1 : length + 1]
    total, _, _ = cross_entropy(x, p.head_DV, targets, weights_BL, cfg.z_loss_coef)
    return total / weights_BL.sum() + auxiliary
