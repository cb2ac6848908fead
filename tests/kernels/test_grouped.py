"""Loops over blocks of rows equal each group's own plain computation: values and all gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from jaxmoe.kernels.grouped import BLOCK, Rowwise, grouped, grouped_gradients

D, F = 6, 10


def f(w: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
    into, out = w
    return (jnp.tanh(x @ into) * weights[:, None]) @ out


HALVES = Rowwise(
    into=lambda w, x: x @ w[0], out=lambda w, h, weights: (jnp.tanh(h) * weights[:, None]) @ w[1]
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def case(lengths: Any, gap: int = 0) -> tuple[Any, ...]:
    """Segments [e, g] one after another, `gap` rows of nobody behind each."""
    lengths = np.array(lengths, np.int32)
    ends = (lengths + gap).ravel().cumsum().reshape(lengths.shape)
    starts = (ends - lengths - gap).astype(np.int32)
    rows = max(1, int(ends.ravel()[-1]))
    e = len(lengths)
    w = (draw(1, e, D, F), draw(2, e, F, D))
    return w, draw(3, rows, D), draw(4, rows), starts, lengths, draw(5, rows, D)


def plainly(w: Any, x: Any, weights: Any, starts: Any, lengths: Any, dy: Any) -> tuple[Any, ...]:
    """Every group by itself; rows of nobody are zero."""
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dw = jax.tree.map(np.zeros_like, w)
    for e, g in np.ndindex(*lengths.shape):
        rows = slice(starts[e, g], starts[e, g] + lengths[e, g])
        own = jax.tree.map(lambda a, e=e: a[e], w)
        with jax.disable_jit():
            y[rows], pull = jax.vjp(f, own, jnp.asarray(x[rows]), jnp.asarray(weights[rows]))
            more, dx[rows], dweights[rows] = pull(jnp.asarray(dy[rows]))
        for total, part in zip(dw, more, strict=True):
            total[e] += part
    return y, dw, dx, dweights


CASES = {
    "one group": case([[300]]),
    "one row": case([[1]]),
    "empty groups": case([[0], [5], [0], [0], [BLOCK + 3], [0]]),
    "one giant group": case([[0], [4 * BLOCK], [0]]),
    "whole blocks": case([[BLOCK], [2 * BLOCK], [BLOCK]]),
    "ragged": case([[1], [BLOCK - 1], [BLOCK + 1], [7], [2 * BLOCK - 1]]),
    "segments with gaps": case([[3, 0, BLOCK + 9], [0, 0, 0], [40, 1, 2]], gap=11),
    "256 groups": case(np.random.default_rng(0).integers(0, 4, (256, 1))),
}


@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_equals_each_group_alone(name: str, keep: bool) -> None:
    w, x, weights, starts, lengths, dy = CASES[name]
    inside = np.zeros(len(x), bool)
    for start, length in zip(starts.ravel(), lengths.ravel(), strict=True):
        inside[start : start + length] = True
    inputs = w, x, weights, starts, lengths
    y, kept = jax.jit(partial(grouped, HALVES, keep=keep))(*inputs)
    dw, dx, dweights = jax.jit(partial(grouped_gradients, HALVES))(*inputs, dy, kept_SX=kept)
    wanted = plainly(w, x, weights, starts, lengths, dy)
    got = (y, dw, dx, dweights)
    for part, ours, plain in zip(("y", "dw", "dx", "dweights"), got, wanted, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            a, b = (np.asarray(v) if part == "dw" else np.asarray(v)[inside] for v in (a, b))
            assert_close(a, b, name=part)


def test_kept_rows_are_read_and_not_made_again() -> None:
    """Other hidden rows, other gradients; and a matmul less in the compiled loop."""
    w, x, weights, starts, lengths, dy = CASES["ragged"]
    backward = jax.jit(partial(grouped_gradients, HALVES))
    inputs = w, x, weights, starts, lengths, dy
    _, kept = grouped(HALVES, *inputs[:-1], keep=True)
    assert kept is not None
    _, _, of_none = backward(*inputs, kept_SX=0 * kept)
    np.testing.assert_array_equal(of_none, 0)
    texts = [str(backward.lower(*inputs, kept_SX=k).compile().as_text()) for k in (None, kept)]
    again, read = (text.count(" dot(") + text.count("custom-call(") for text in texts)
    assert again > read > 0


def test_bfloat16_adds_up_gradients_in_float32() -> None:
    """4,096 rows whose gradients are all equal: a bfloat16 sum would stop growing at 256."""
    w = (jnp.ones((1, 1, 1), jnp.bfloat16),)
    x, ones = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones(4096, jnp.float32)
    starts, lengths = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 4096, jnp.int32)
    linear = Rowwise(into=lambda w, x: x @ w[0], out=lambda w, h, _: h)
    dw, dx, _ = grouped_gradients(linear, w, x, ones, starts, lengths, x)
    assert float(dw[0][0, 0, 0]) == 4096 and dw[0].dtype == dx.dtype == jnp.bfloat16
