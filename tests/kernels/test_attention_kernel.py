"""Chunked causal attention is softmax attention: values, gradients, and who sees whom."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import FEATURES, SCALE, K, N, draw, features_equal_the_plain_einsum
from reference import assert_close

from jaxmoe.kernels.attention import CHUNK, LONG, causal_attention

# One position; one chunk, not full; two chunks, the last one short; the most chunks, and one length
# beyond, which is the online softmax's (three blocks, the last one short).
LENGTHS = (1, 37, CHUNK + 7, LONG - 3, LONG + 21)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_plain_einsum(length: int) -> None:
    q, k, v, ct = draw(length, batch=1 if length > 200 else 3)
    q = 3 * q  # sharp enough that scores matter

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        o, pull = jax.vjp(partial(causal_attention, scale=SCALE), q, k, v)
        plain = partial(reference.causal_attention, scale=SCALE)
        wanted, pull_wanted = jax.vjp(plain, q, k, v)
        return (o, *pull(ct)), (wanted, *pull_wanted(ct))

    for name, got, want in zip(("o", "dq", "dk", "dv"), *both(q, k, v), strict=True):
        if length == 1 and name in ("dq", "dk"):  # a softmax over one key has no gradient
            assert abs(got).max() < 1e-6
        else:
            assert_close(got, want, name=name)


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_the_plain_einsum(name: str) -> None:
    """Values, and gradients of queries, keys, values and sinks."""
    features_equal_the_plain_einsum(causal_attention, *FEATURES[name])


def test_a_constant_softmax_averages_what_is_visible() -> None:
    """With equal scores position i gives the mean of the values that it sees."""
    length = CHUNK + 5
    q, k, v, _ = draw(length)
    attend = jax.jit(causal_attention, static_argnames=("scale", "window"))
    o = attend(jnp.zeros_like(q), k, v, scale=SCALE)
    mean = np.cumsum(v, axis=1) / np.arange(1, length + 1)[None, :, None, None]
    assert_close(o, np.repeat(mean, N // K, axis=2))
    windowed = attend(jnp.zeros_like(q), k, v, scale=SCALE, window=4)
    assert_close(windowed[:, 9, 0], np.asarray(v)[:, 6:10, 0].mean(1))
    # A sink of log(3) is worth three more values, which are zero.
    sunk = attend(jnp.zeros_like(q), k, v, None, jnp.full(N, math.log(3.0)), scale=SCALE)
    assert_close(sunk[:, 9, 0], np.asarray(v)[:, :10, 0].sum(1) / 13)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax() -> None:
    q, k, v, _ = (a.astype(jnp.bfloat16) for a in draw(37))
    o = jax.jit(partial(causal_attention, scale=SCALE))(q, k, v)
    assert o.dtype == jnp.bfloat16
    plain = jax.jit(partial(reference.causal_attention, scale=SCALE))
    wanted = plain(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert_close(o.astype(jnp.float32), wanted, tolerance=1e-2)
