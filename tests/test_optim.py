"""Optimisers and schedules against formulas by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import on, put
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import ModelConfig, OptimConfig, replace
from jaxmoe.model.lm import lm_specs
from jaxmoe.optim import optimizer, orthogonalize, relative_path, schedule
from jaxmoe.spec import Spec

PLAN = OptimConfig(lr=0.5, warmup_steps=10, decay_fraction=0.2, final_lr=0.1)
STEPS = 100


@pytest.mark.parametrize(
    ("name", "corners"),
    [
        # The decay's first update is still at the peak; final_lr is reached one after the last.
        ("wsd", {0: 0.1, 4: 0.5, 9: 1, 10: 1, 80: 1, 81: 0.955, 90: 0.55, 99: 0.145, 100: 0.1}),
        ("cosine", {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1}),
        ("constant", {0: 0.1, 9: 1, 10: 1, 99: 1}),
    ],
)
def test_schedule_corners(name: Any, corners: dict[int, float]) -> None:
    """Update index -> rate over its peak."""
    rate = schedule(replace(PLAN, schedule=name), STEPS)
    got = {i: float(rate(i)) / PLAN.lr for i in corners}
    assert got == pytest.approx(corners, rel=1e-5)


def test_schedule_without_warmup_or_decay() -> None:
    for name in ("wsd", "cosine", "constant"):
        rate = schedule(replace(PLAN, schedule=name, warmup_steps=0), STEPS)
        assert float(rate(0)) == pytest.approx(PLAN.lr)
    one = schedule(replace(PLAN, warmup_steps=1), STEPS)
    assert [float(one(i)) for i in (0, 1)] == pytest.approx([PLAN.lr, PLAN.lr])


def test_relative_path_is_the_schedule_over_its_peak() -> None:
    path = relative_path(PLAN, STEPS)
    assert path.dtype == np.float64 and path.shape == (STEPS,) and path.max() == pytest.approx(1)
    rate = schedule(PLAN, STEPS)
    np.testing.assert_allclose(path, [float(rate(i)) / 0.5 for i in range(STEPS)], rtol=1e-6)
    np.testing.assert_allclose(relative_path(replace(PLAN, lr=0.07), STEPS), path, rtol=1e-6)


SPECS = {
    "matrix": Spec(shape=(6, 10), axes=("embed", "ff"), inputs=("embed",)),
    "norm": Spec(shape=(7,), axes=("norm",), init="ones"),
}
ADAMW = OptimConfig(
    lr=0.1, clip=1e9, weight_decay=0.3, warmup_steps=0, schedule="constant", eps=1e-3
)


def draw(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return spec_lib.map_specs(lambda s: rng.normal(size=s.shape).astype(np.float32), SPECS)


def test_adamw_by_hand() -> None:
    """Three updates: Adam's with bias corrections, and decoupled decay of the matrix only."""
    tx = optimizer(ADAMW, SPECS, STEPS)
    params: Any = draw(0)
    state = tx.init(params)
    hand: dict[str, Any] = {name: np.float64(p) for name, p in params.items()}
    m, v = ({name: np.zeros(s.shape) for name, s in SPECS.items()} for _ in range(2))
    for t in range(1, 4):
        grads = draw(t)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-3)
            decay = 0.3 * hand[name] if name == "matrix" else 0
            hand[name] = hand[name] - 0.1 * (step + decay)
    for name, value in hand.items():
        assert_close(params[name], value, name=name)


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_clip_is_of_the_global_norm(clip: float) -> None:
    tx = optimizer(replace(ADAMW, clip=clip), SPECS, STEPS)
    grads = draw(1)
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    _, state = tx.update(grads, tx.init(draw(0)), draw(0))
    moment: Any = optax.tree.get(state, "mu")
    for name, g in grads.items():
        assert_close(moment[name], 0.1 * g * min(1, clip / norm), name=name)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_decay_is_of_matrices_only(name: Any) -> None:
    """With no gradient a matrix shrinks by lr * decay; embedding, head and norms stay."""
    cfg = ModelConfig(
        vocab_size=42, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, d_head=4, n_experts=5
    )
    specs = lm_specs(cfg)
    tx = optimizer(replace(ADAMW, name=name), specs, STEPS)
    with jax.set_mesh(on()):
        params = put(on(), spec_lib.init(specs, jax.random.key(0)), P())

        @jax.jit
        def update(params: Any) -> Any:
            return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

        updates = update(params)
    decayed = set()
    for (path, u), p in zip(tree.named_leaves(updates), jax.tree.leaves(params), strict=True):
        if np.abs(u).max() > 0:
            decayed.add(path.split("/")[-1])
            assert_close(u, -0.1 * 0.3 * np.asarray(p), name=path)
    attention = {"wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD"}
    assert decayed == attention | {"wgate_EDF", "wup_EDF", "wdown_EFD", "w_DE"}


# Muon

STACK = Spec(
    shape=(3, 4, 10, 24), axes=("layers", "experts", "expert_embed", "ff"), inputs=("expert_embed",)
)
OUT = Spec(shape=(2, 3, 4, 20), axes=("layers", "heads", "head", "embed"), inputs=("heads", "head"))


def orthogonalized(spec: Spec, update: np.ndarray) -> np.ndarray:
    """As matrices [stack ..., fan_in, fan_out]."""
    with jax.set_mesh(on()):
        done = jax.jit(orthogonalize, static_argnums=1)(put(on(), update, P()), spec)
    n = len([a for a in spec.axes if a in spec_lib.BATCH_AXES])
    assert done.shape == spec.shape
    return np.asarray(done).reshape(*spec.shape[:n], spec.fan_in, -1)


@pytest.mark.parametrize("spec", [STACK, OUT], ids=["experts", "attention out"])
def test_muon_updates_are_near_orthogonal(spec: Spec) -> None:
    """Singular values near one, up to the scale that gives the RMS of an Adam update, 0.2."""
    matrices = orthogonalized(spec, np.random.default_rng(0).normal(size=spec.shape).astype("f4"))
    scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))
    values = np.linalg.svd(matrices, compute_uv=False) / scale
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(np.sqrt((matrices**2).mean((-1, -2))), 0.2, rtol=0.2)


def test_muon_keeps_the_singular_vectors() -> None:
    """The nearest orthogonal matrix of U S V' is U V': the product with it is symmetric."""
    update = np.random.default_rng(0).normal(size=OUT.shape).astype(np.float32)
    got = orthogonalized(OUT, update)[1]
    u, _, vt = np.linalg.svd(update[1].reshape(12, 20), full_matrices=False)
    inner = u.T @ got @ vt.T
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-3 and (np.diag(inner) > 0).all()


def test_muon_of_a_stack_is_of_each_matrix_alone() -> None:
    update = np.random.default_rng(0).normal(size=STACK.shape).astype(np.float32)
    together = orthogonalized(STACK, update)
    changed = update.copy()
    changed[1, 2] = 1000 * changed[1, 2].T.reshape(10, 24)
    after = orthogonalized(STACK, changed)
    same = np.ones((3, 4), bool)
    same[1, 2] = False
    np.testing.assert_array_equal(together[same], after[same])
    assert np.abs(together[1, 2] - after[1, 2]).max() > 0.1
    single = Spec(shape=(10, 24), axes=("expert_embed", "ff"), inputs=("expert_embed",))
    assert_close(orthogonalized(single, update[2, 3]), together[2, 3])
    assert_close(orthogonalized(single, 100 * update[2, 3]), together[2, 3])  # scale is gone
