"""What `model.remat` keeps, to the byte, and that it changes no number."""

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
from jaxmoe.config import ModelConfig, replace
from jaxmoe.model.lm import lm_loss, lm_specs

MODEL = ModelConfig(
    vocab_size=42,
    d_model=24,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ff=14,
    d_ff_dense=22,
    n_experts=8,
    top_k=3,
    n_shared_experts=1,
    first_dense=1,
    loss_chunk=4,
)
B, L = 20, 16  # no dim of a parameter
POLICIES = ("none", "matmuls", "attention", "full", "offload")
MESH = {"data": 2, "expert": 2, "model": 2}


def loss(params: Any, tokens_BL: Any, model: ModelConfig) -> Any:
    weights_BL = jnp.ones_like(tokens_BL[:, 1:], jnp.float32)
    return lm_loss(params, tokens_BL[:, :-1], tokens_BL[:, 1:], weights_BL, model)[0].total


@functools.cache
def inputs() -> tuple[Any, np.ndarray]:
    params = jax.tree.map(np.asarray, spec_lib.init(lm_specs(MODEL), jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, L + 1)).astype(np.int32)
    return params, tokens


def placed(mesh: Any) -> tuple[Any, Any]:
    params, tokens = inputs()
    at_rest = mesh_lib.shardings(lm_specs(MODEL), mesh)
    return jax.device_put(params, at_rest), put(mesh, tokens)


@functools.cache
def gradients(policy: str, path: Any = "auto", **axes: int) -> Any:
    mesh = on(**axes)
    model = replace(MODEL, remat=policy, expert_path=path)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        return jax.tree.map(np.asarray, step(*placed(mesh), model))


def residuals(policy: str, dtype: Any = "float32") -> list[Any]:
    """What the forward pass leaves for the backward pass, as types."""
    model = replace(MODEL, remat=policy, dtype=dtype)
    with jax.set_mesh(on()):
        params, tokens = placed(on())
        forward = lambda p: jax.vjp(lambda q: loss(q, tokens, model), p)[1]  # noqa: E731
        return list(jax.make_jaxpr(forward)(params).out_avals)


def bytes_of(arrays: list[Any]) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_no_policy_changes_a_number(policy: str) -> None:
    (value, grads), (wanted, of_none) = gradients(policy), gradients("none")
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    theirs = dict(tree.named_leaves(of_none))
    for name, leaf in tree.named_leaves(grads):
        assert_close(leaf, theirs[name], 2e-6, name)


@pytest.mark.parametrize("path", ["blocked", "kernel"])
def test_kept_hidden_rows_of_experts_on_a_mesh(path: str) -> None:
    """Without an `expert` axis, where they are kept by a shard of the batch, of L and of F."""
    axes = {"data": 2, "context": 2, "model": 2}
    (value, grads), (wanted, of_none) = gradients("matmuls", path, **axes), gradients("none")
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    theirs = dict(tree.named_leaves(of_none))
    for name, leaf in tree.named_leaves(grads):
        assert_close(leaf, theirs[name], 1e-5, name)


def test_offloading_gives_the_same_on_a_mesh() -> None:
    """Attention's outputs are named, and sent to the host, inside of a shard_map."""
    (value, grads), (wanted, of_none) = gradients("offload", **MESH), gradients("none")
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    theirs = dict(tree.named_leaves(of_none))
    for name, leaf in tree.named_leaves(grads):
        assert_close(leaf, theirs[name], 1e-5, name)


def test_each_policy_keeps_what_it_names() -> None:
    """Float32 bytes of all layers: queries, keys and values; then gate and up of the dense layer,
    of three shared experts, and of three times the experts that a token goes to."""
    sizes = {policy: bytes_of(residuals(policy)) for policy in POLICIES}
    rows, m = 4 * B * L, MODEL
    qkv = rows * m.n_layers * (m.n_heads + 2 * m.n_kv_heads) * m.d_head
    hidden = rows * 2 * (m.d_ff_dense + 3 * m.d_ff + 3 * m.top_k * m.d_ff)
    assert sizes["attention"] - sizes["full"] == qkv
    assert sizes["matmuls"] - sizes["attention"] == hidden
    assert sizes["none"] > sizes["matmuls"]


def test_offload_leaves_nothing_of_the_layers_on_the_device() -> None:
    """In the host's memory: two inputs a layer, attention's outputs and their log-sum-exps. On the
    device: of all layers only parameters, and where the rows went."""
    spaces: dict[str, list[Any]] = {"host": [], "device": []}
    for leaf in residuals("offload"):
        spaces["host" if leaf.memory_space == jax.memory.Space.Host else "device"].append(leaf)
    rows, m = 4 * B * L, MODEL
    wanted = rows * m.n_layers * (2 * m.d_model + m.n_heads * m.d_head + m.n_heads)
    assert bytes_of(spaces["host"]) == wanted
    left = activations(spaces["device"])
    assert {a.dtype for a in left} == {jnp.dtype("int32")} and bytes_of(left) == choices()


def test_full_keeps_inputs_and_attention_alone() -> None:
    """Also where there are experts: no float array of the router, no weight as it is gathered."""
    rows, m = 4 * B * L, MODEL
    wanted = rows * m.n_layers * (2 * m.d_model + m.n_heads * m.d_head + m.n_heads)
    assert bytes_of(activations(residuals("full"))) == wanted + choices()
    halved = [a.shape for a in residuals("full", "bfloat16") if a.dtype == jnp.bfloat16]
    assert len(halved) > 5 and not [s for s in halved if m.n_experts in s and len(s) == 4], halved


def choices() -> int:
    """Bytes of three layers with experts: ids by token, and places in the order of the rows."""
    return 3 * 2 * 4 * B * L * MODEL.top_k


def activations(arrays: list[Any]) -> list[Any]:
    """Those of a scan over layers (of 1 and of 3) that have a row or a head of the batch."""
    wide = (B, B * L, B * MODEL.n_kv_heads)
    return [a for a in arrays if a.ndim > 2 and a.shape[0] in (1, 3) and a.shape[1] in wide]


def test_the_compiled_program_uses_less_memory() -> None:
    sizes = {}
    with jax.set_mesh(on()):
        params, _ = placed(on())
        tokens = put(on(), np.zeros((16, 49), np.int32))
        for policy in ("none", "full"):
            step = jax.jit(jax.grad(loss), static_argnums=2)
            program = step.lower(params, tokens, replace(MODEL, remat=policy)).compile()
            analysis: Any = program.memory_analysis()
            sizes[policy] = analysis.temp_size_in_bytes
    assert sizes["none"] > sizes["full"], sizes
