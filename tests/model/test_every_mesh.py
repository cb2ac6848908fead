"""Loss, what the routers did and every gradient of three kinds of model on meshes of eight devices:
each axis alone, and combinations of three. By default one mesh a model; all of them with -m slow.
"""

import functools
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from meshes import on, put

from jaxmoe import tree
from jaxmoe.config import Config, MeshConfig, MlaConfig, ModelConfig, RouterConfig, replace
from jaxmoe.model.router import RouterStats
from jaxmoe.run.state import abstract_state, param_specs
from jaxmoe.run.step import Batch, eval_step, gradients
from jaxmoe.spec import init

B, L = 8, 16
COMMON: dict[str, Any] = {"vocab_size": 40, "d_model": 24, "loss_chunk": 2, "z_loss_coef": 0.01}

MODELS = {
    # Grouped queries, all layers alike.
    "mixtral": ModelConfig(
        **COMMON,
        n_layers=8,
        n_heads=16,
        n_kv_heads=8,
        d_head=4,
        qk_norm="none",
        d_ff=16,
        n_experts=8,
        top_k=2,
        router=RouterConfig(load_balance_coef=0.1, z_coef=0.05),
    ),
    # Latent attention, groups of experts, a shared one, a dense layer, one token further.
    "deepseek": ModelConfig(
        **COMMON,
        n_layers=9,
        n_heads=8,
        n_kv_heads=8,
        mla=MlaConfig(q_rank=16, kv_rank=16, d_nope=4, d_rope=2, d_value=6),
        d_ff=8,
        n_experts=16,
        top_k=4,
        n_shared_experts=1,
        first_dense=1,
        d_ff_dense=32,
        n_mtp=1,
        router=RouterConfig(
            score="sigmoid",
            n_groups=4,
            top_k_groups=2,
            balance_bias_rate=0.01,
            load_balance_coef=0.1,
            load_balance_scope="sequence",
            z_coef=0.0,
        ),
    ),
    # Multi-query, and texts packed into rows.
    "gpt4": ModelConfig(
        **COMMON,
        n_layers=8,
        n_heads=8,
        n_kv_heads=1,
        d_head=4,
        qk_norm="none",
        d_ff=24,
        n_experts=16,
        top_k=2,
        router=RouterConfig(load_balance_coef=0.1, z_coef=0.05),
    ),
}

MESHES: dict[str, dict[str, int]] = {
    "replica8": {"replica": 8},
    "stage8": {"stage": 8},
    "data8": {"data": 8},
    "context8": {"context": 8},
    "expert8": {"expert": 8},
    "model8": {"model": 8},
    "stage4_rounds2_model2": {"stage": 4, "rounds": 2, "model": 2},
    "stage2_rounds4_data2_expert2": {"stage": 2, "rounds": 4, "data": 2, "expert": 2},
    "stage2_data2_model2": {"stage": 2, "data": 2, "model": 2},
    "stage2_rounds2_expert2_model2": {"stage": 2, "rounds": 2, "expert": 2, "model": 2},
    "replica2_stage2_expert2": {"replica": 2, "stage": 2, "expert": 2},
    "data2_expert2_model2": {"data": 2, "expert": 2, "model": 2},
    "replica2_expert2_model2": {"replica": 2, "expert": 2, "model": 2},
    "data2_context2_model2": {"data": 2, "context": 2, "model": 2},
    "context4_expert2": {"context": 4, "expert": 2},
    "stage2_context2_expert2": {"stage": 2, "context": 2, "expert": 2},
    "replica2_stage2_context2": {"replica": 2, "stage": 2, "context": 2},
}
BY_DEFAULT = {
    ("mixtral", "stage2_rounds2_expert2_model2"),
    ("deepseek", "replica2_stage2_expert2"),
    ("gpt4", "stage2_context2_expert2"),
}
CASES = [
    pytest.param(m, on, marks=() if (m, on) in BY_DEFAULT else pytest.mark.slow)
    for m in MODELS
    for on in MESHES
]


@functools.cache
def batch(model: str) -> Batch:
    """Tokens, targets, uneven weights, and documents where the model has texts in rows."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, COMMON["vocab_size"], (B, L + 1)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, L), p=[0.3, 0.3, 0.4]).astype(np.float32)
    if model != "gpt4":
        return Batch(rows, weights)
    documents = np.sort(rng.integers(0, 4, (B, L)), axis=1).astype(np.int32)
    return Batch(rows, weights * (documents > 0), documents)


def health(router: RouterStats) -> list[Any]:
    """Of all layers, what the layout must not change: whether a buffer overflows it may."""
    return jax.tree.leaves(replace(router, overflow=None))


@functools.cache
def found(model: str, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss, and gradients by name, in the shapes of a model without a pipeline."""
    axes = dict(MESHES.get(name, {}))
    layout = MeshConfig(rounds=axes.pop("rounds", 1))
    cfg = MODELS[model]
    config, mesh = Config(model=cfg, mesh=layout), on(**axes)

    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).params)
        make = jax.jit(lambda: init(param_specs(config), jax.random.key(1)), out_shardings=placed)
        params = make()
        given = put(mesh, batch(model))
        step = jax.jit(gradients, static_argnums=2)
        grads, (sums, stats) = step(params, given, config)
        again = step(params, given, config)
        if "replica" in axes:  # an evaluation is made otherwise there, too
            held_out = eval_step(params, given, config)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), held_out, sums)
    # Run to run not a bit changes.
    jax.tree.map(np.testing.assert_array_equal, again, (grads, (sums, stats)))
    plain = dict(tree.named_leaves(param_specs(replace(config, mesh=MeshConfig()))))
    value = [*jax.tree.leaves(sums), *stats.mtp_nll, *map(np.ravel, health(stats.router))]
    return np.hstack(value), {
        leaf: np.asarray(grad).reshape(plain[leaf].shape) for leaf, grad in tree.named_leaves(grads)
    }


@pytest.mark.parametrize(("model", "name"), CASES)
def test_loss_and_gradients_are_those_of_one_device(model: str, name: str) -> None:
    (value, grads), (wanted_value, wanted) = found(model, name), found(model, "one")
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    for leaf, grad in grads.items():
        scale = float(np.abs(wanted[leaf]).max())
        # The balance bias has no gradient.
        assert scale > 0 or leaf.endswith("balance_bias_E"), leaf
        np.testing.assert_allclose(grad, wanted[leaf], atol=1e-5 * scale, err_msg=leaf)
