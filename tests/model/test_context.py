"""Sequences spread over `context`: the same loss, gradients and logits as on one device, with all
that attention can do, documents that begin anywhere, and tokens predicted further ahead."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import on, put
from reference import assert_close

from jaxmoe import mesh as mesh_lib
from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import MlaConfig, ModelConfig, RouterConfig, replace
from jaxmoe.kernels import exchange
from jaxmoe.model.lm import Lm, lm_logits, lm_loss, lm_specs, mtp_logits

B, L, VOCAB = 2, 16, 46
LATENT = ModelConfig(
    vocab_size=VOCAB,
    d_model=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=6,
    mla=MlaConfig(q_rank=8, kv_rank=16, d_nope=4, d_rope=6, d_value=7),
    qk_norm="none",
    d_ff=14,
    n_experts=8,
    top_k=3,
    first_dense=1,
    router=RouterConfig(load_balance_coef=0.1, load_balance_scope="sequence", jitter=0.1),
    n_mtp=2,
    z_loss_coef=0.01,
    loss_chunk=2,
)
WINDOWS = ModelConfig(
    vocab_size=VOCAB,
    d_model=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=1,
    d_head=8,
    attention_sinks=True,
    attention_soft_cap=4.0,
    sliding_window=5,
    global_every=2,
    d_ff=14,
    n_experts=1,
    top_k=1,
    loss_chunk=4,
)
# (model, mesh, context_attention); 8 shards of a window of 5: its neighbours', on two sides.
CASES: dict[str, tuple[ModelConfig, dict[str, int], Any]] = {
    "latent": (LATENT, {"data": 2, "context": 4}, "ring"),
    "latent, gathered": (LATENT, {"context": 2, "expert": 2}, "gather"),
    "windows": (WINDOWS, {"context": 2, "model": 2}, "ring"),
    "windows of neighbours": (replace(WINDOWS, loss_chunk=2), {"context": 8}, "auto"),
}
# Longer than a shard, within a block, over the seam of the zigzag; and padding.
DOCUMENTS = np.array([[1] * 3 + [2] * 9 + [3] * 4, [1] * 1 + [2] * 6 + [3] * 6 + [0] * 3], np.int32)


@pytest.fixture(autouse=True)
def _one_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CAPACITY_FACTORS", (1.25,))  # each costs compile time


@functools.cache
def start(cfg: ModelConfig) -> Lm:
    drawn = jax.jit(lambda key: spec_lib.init(lm_specs(cfg), key))(jax.random.key(0))

    def one(a: Any) -> np.ndarray:  # sinks start at zero, and would not be told apart
        if np.any(a):
            return np.asarray(a)
        return np.linspace(-1, 2, a.size, dtype=np.float32).reshape(a.shape)

    return jax.tree.map(one, drawn)


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.choice([0.0, 0.5, 1.0], (B, L)).astype(np.float32) * (DOCUMENTS > 0)
    return rng.integers(0, VOCAB, (B, L + 1)).astype(np.int32), weights.astype(np.float32)


@functools.cache
def trained(cfg: ModelConfig, axes: tuple[tuple[str, int], ...]) -> tuple[float, dict[str, Any]]:
    """The objective, and the gradient of every parameter."""
    mesh = on(**dict(axes))

    def objective(params: Any, tokens: Any, weights: Any, documents: Any) -> jax.Array:
        key = jax.random.key(3) if cfg.router.jitter else None
        sums, _ = lm_loss(
            params, tokens[:, :-1], tokens[:, 1:], weights, cfg, documents_BL=documents, key=key
        )
        return sums.total / sums.weight

    with jax.set_mesh(mesh):
        params = jax.device_put(start(cfg), mesh_lib.shardings(lm_specs(cfg), mesh))
        args = put(mesh, (*batch(), DOCUMENTS))
        loss, grads = jax.jit(jax.value_and_grad(objective))(params, *args)
    return float(loss), dict(tree.named_leaves(jax.tree.map(np.asarray, grads)))


@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradients_as_on_one_device(name: str) -> None:
    cfg, axes, way = CASES[name]
    loss, grads = trained(replace(cfg, context_attention=way), tuple(axes.items()))
    want_loss, want = trained(replace(cfg, loss_chunk=4), ())
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert len(want) > 10
    for leaf, gradient in grads.items():
        assert_close(gradient, want[leaf], name=leaf)


def test_logits_come_back_in_order() -> None:
    tokens = batch()[0][:, :L]

    def logits(params: Any, tokens: Any, documents: Any) -> list[jax.Array]:
        further = mtp_logits(params, tokens, LATENT)
        return [lm_logits(params, tokens, LATENT, documents), *further]

    found = []
    for axes in ({}, {"context": 4, "model": 2}):
        mesh = on(**axes)
        with jax.set_mesh(mesh):
            params = jax.device_put(start(LATENT), mesh_lib.shardings(lm_specs(LATENT), mesh))
            found.append(jax.jit(logits)(params, *put(mesh, (tokens, DOCUMENTS))))
    for k, (want, got) in enumerate(zip(*found, strict=True)):
        assert got.shape == (B, L - k, VOCAB) and jnp.ptp(want) > 1
        assert_close(got, want)
