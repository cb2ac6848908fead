"""float8 matmuls are what numpy makes of the same rounding, forward and backward, on any mesh."""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import on, put, put_params

from jaxmoe import spec as spec_lib
from jaxmoe.config import ModelConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.kernels.low_precision import einsum
from jaxmoe.mesh import BATCH
from jaxmoe.model.lm import lm_loss, lm_specs

SPECS = ("BLD,DNH->BLNH", "BLNH,NHD->BLD", "rD,DX->rX", "erD,eDf->erf")
SIZES = dict(B=3, L=5, D=24, N=4, H=6, r=20, X=8, e=4, f=10)
VALUE, GRADIENT = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def draw(letters: str, seed: int) -> np.ndarray:
    """Rows and columns of very different size, which one scale for all would lose."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=[SIZES[letter] for letter in letters])
    for axis in range(a.ndim):
        shape = [1] * a.ndim
        shape[axis] = -1
        a *= 10 ** rng.uniform(-1.5, 1.5, a.shape[axis]).reshape(shape)
    return a.astype(np.float32)


def rounded(a: np.ndarray, letters: str, out: str, dtype: Any) -> np.ndarray:
    """Over the largest value of each row of what is summed, in float8 and back."""
    axes = tuple(i for i, letter in enumerate(letters) if letter not in out)
    scale = np.abs(a).max(axes, keepdims=True) / float(ml_dtypes.finfo(dtype).max)
    return (a / scale).astype(dtype).astype(np.float64) * scale


def plainly(spec: str, a: np.ndarray, of_a: Any, b: np.ndarray, of_b: Any) -> np.ndarray:
    operands, out = spec.split("->")
    letters_a, letters_b = operands.split(",")
    return np.einsum(spec, rounded(a, letters_a, out, of_a), rounded(b, letters_b, out, of_b))


def close(got: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Element by element, since sizes differ by orders of magnitude."""
    scale = np.abs(wanted) + 1e-3 * np.abs(wanted).mean()
    assert (np.abs(np.asarray(got, np.float64) - wanted) / scale).max() < tolerance


@pytest.mark.parametrize("spec", SPECS)
def test_float8_is_the_rounding_of_each_operand(spec: str) -> None:
    operands, out = spec.split("->")
    of_x, of_w = operands.split(",")
    x, w, dy = draw(of_x, 0), draw(of_w, 1), draw(out, 2)
    y, pull = jax.vjp(lambda x, w: einsum(spec, x, w, "float8"), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    close(y, plainly(spec, x, VALUE, w, VALUE))
    close(dx, plainly(f"{out},{of_w}->{of_x}", dy, GRADIENT, w, VALUE))
    close(dw, plainly(f"{of_x},{out}->{of_w}", x, VALUE, dy, GRADIENT))
    exact = np.einsum(spec, x, w)
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.06, "float8 is neither exact nor far off"


def test_sums_are_float32_and_results_of_the_dtype_that_came_in() -> None:
    """4,096 equal products: a bfloat16 sum would stop growing at 256."""
    ones = jnp.ones((2, 4096), jnp.bfloat16)
    y = einsum("rD,DX->rX", ones, ones.T, "float8")
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 4096


def test_plain_is_untouched() -> None:
    x, w = draw("rD", 0), draw("DX", 1)
    np.testing.assert_array_equal(
        einsum("rD,DX->rX", jnp.asarray(x), jnp.asarray(w), "plain"), jnp.asarray(x) @ w
    )


def test_sharded_operands_give_the_same() -> None:
    """The sum over a sharded dim has one scale, that of all shards."""
    x, w, dy = draw("BLNH", 0)[:2], draw("NHD", 1), draw("BLD", 2)[:2]

    def run(x: Any, w: Any, dy: Any) -> Any:
        rows = P(BATCH, None, None)
        f = partial(einsum, "BLNH,NHD->BLD", matmul="float8", out_sharding=rows)
        y, pull = jax.vjp(f, x, w)
        return y, pull(dy)

    found = []
    for axes in ({}, {"data": 2, "model": 4}):
        mesh = on(**axes)
        rows, heads = P(BATCH), P(BATCH, None, "model")
        with jax.set_mesh(mesh):
            found.append(jax.jit(run)(*put(mesh, (x, w, dy), (heads, P("model"), rows))))
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        close(many, np.asarray(one, np.float64))


@pytest.mark.parametrize("path", ["blocked", "batched"])
def test_a_model_of_float8_learns_nearly_the_same(path: Any) -> None:
    """Loss and gradients of a whole model, one also on 2 x 2 x 2 devices: near those of float32,
    and not the same."""
    cfg = ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=1,
        d_head=8,
        d_ff=24,
        n_experts=4,
        n_shared_experts=1,
        loss_chunk=8,
        expert_path=path,
    )
    params = spec_lib.init(lm_specs(cfg), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    weights = np.ones((8, 16), np.float32)

    def run(matmul: Any, **axes: int) -> tuple[float, np.ndarray]:
        mesh, own = on(**axes), replace(cfg, matmul=matmul)

        def loss(p: Any, *batch: Any) -> Any:
            sums, _ = lm_loss(p, *batch, cfg=own)
            return sums.total / sums.weight

        with jax.set_mesh(mesh):
            batch = put(mesh, (tokens[:, :-1], tokens[:, 1:], weights))
            placed = put_params(mesh, params, lm_specs(cfg))
            value, grads = jax.jit(jax.value_and_grad(loss))(placed, *batch)
        return float(value), np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

    plain, one = run("plain"), run("float8")
    found = [one]
    if path == "blocked":
        found.append(run("float8", data=2, expert=2, model=2))
        assert abs(one[0] - found[1][0]) < 5e-3
    for value, gradient in found:
        assert 1e-6 < abs(value - plain[0]) < 2e-2
        cosine = gradient @ plain[1] / np.linalg.norm(gradient) / np.linalg.norm(plain[1])
        assert 0.97 < cosine < 0.99999


def test_without_qwix_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'jaxmoe\[float8\]'"):
        einsum("rD,DX->rX", jnp.ones((2, 3)), jnp.ones((3, 4)), "float8")
