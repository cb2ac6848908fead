"""Position i depends on positions 0 .. i of its own sequence, and on nothing else."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from meshes import on, put, put_params

from jaxmoe import spec as spec_lib
from jaxmoe.config import ModelConfig
from jaxmoe.model.attention import attention, attention_specs
from jaxmoe.model.lm import hidden, lm_specs

B, L = 2, 12
CFG = ModelConfig(
    vocab_size=30,
    d_model=20,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    d_ff=14,
    n_experts=5,
    top_k=4,
    loss_chunk=4,
)


def draw(specs: Any) -> Any:
    return jax.jit(lambda key: spec_lib.init(specs, key))(jax.random.key(0))


def gradient_of_attention() -> Callable[[np.ndarray], np.ndarray]:
    specs = attention_specs(CFG)
    params = put_params(on(), draw(specs), specs)
    x = put(on(), jax.random.normal(jax.random.key(1), (B, L, CFG.d_model)))
    pull = jax.jit(jax.grad(lambda x, ct: (attention(params, x, CFG) * ct).sum()))
    return lambda ct: np.asarray(pull(x, ct))


def gradient_of_model() -> Callable[[np.ndarray], np.ndarray]:
    """By rows of the embedding table: every position's token is a different one."""
    params = draw(lm_specs(CFG))
    tokens = np.random.default_rng(0).permutation(CFG.vocab_size)[: B * L].reshape(B, L)
    placed = put(on(), tokens.astype(np.int32))

    def f(embed: Any, ct: Any) -> Any:
        x_BLD, _ = hidden(params.replace(embed_VD=embed), placed, CFG)
        return (x_BLD * ct).sum()

    pull = jax.jit(jax.grad(f))
    return lambda ct: np.asarray(pull(params.embed_VD, ct))[tokens]


@pytest.mark.parametrize("gradient", [gradient_of_attention, gradient_of_model])
def test_no_gradient_from_the_future(gradient: Callable[[], Callable]) -> None:
    """d(output at i) / d(input at j) is exactly zero for j > i, and never for j <= i."""
    mesh = on()
    with jax.set_mesh(mesh):
        pull = gradient()
        for i in range(L):
            ct = np.zeros((B, L, CFG.d_model), np.float32)
            ct[0, i] = np.random.default_rng(i).normal(size=CFG.d_model)
            grad = pull(put(mesh, ct))
            assert not grad[1].any(), "another sequence is seen"
            size = np.abs(grad[0]).max(-1)
            assert not size[i + 1 :].any(), (i, size)
            assert (size[: i + 1] > 1e-7).all(), (i, size)
