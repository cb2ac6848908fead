"""Chunked causal attention is softmax attention: values, gradients, and who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import assert_close

from jaxmoe.kernels.attention import CHUNK, MAX_CHUNKS, causal_attention

N, K, H = 6, 2, 10

# One position; one chunk, not full; two chunks, the last one short; more than MAX_CHUNKS chunks of
# the least size would be needed, and the length divides by nothing.
LENGTHS = (1, 37, CHUNK + 7, CHUNK * MAX_CHUNKS + 21)


def draw(length: int, batch: int = 3) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(length), 4)
    heads = (N, K, K, N)
    return tuple(
        jax.random.normal(key, (batch, length, n, H)) for key, n in zip(keys, heads, strict=True)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_plain_einsum(length: int) -> None:
    q, k, v, ct = draw(length, batch=1 if length > 200 else 3)
    q = 3 * q  # sharp enough that scores matter

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        o, pull = jax.vjp(causal_attention, q, k, v)
        wanted, pull_wanted = jax.vjp(reference.causal_attention, q, k, v)
        return (o, *pull(ct)), (wanted, *pull_wanted(ct))

    for name, got, want in zip(("o", "dq", "dk", "dv"), *both(q, k, v), strict=True):
        if length == 1 and name in ("dq", "dk"):  # a softmax over one key has no gradient
            assert abs(got).max() < 1e-6
        else:
            assert_close(got, want, name=name)


def test_a_constant_softmax_averages_what_is_visible() -> None:
    """With equal scores position i gives the mean of values 0 .. i."""
    length = CHUNK + 5
    q, k, v, _ = draw(length)
    o = jax.jit(causal_attention)(jnp.zeros_like(q), k, v)
    mean = np.cumsum(v, axis=1) / np.arange(1, length + 1)[None, :, None, None]
    assert_close(o, np.repeat(mean, N // K, axis=2))


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax() -> None:
    q, k, v, _ = (a.astype(jnp.bfloat16) for a in draw(37))
    o = jax.jit(causal_attention)(q, k, v)
    assert o.dtype == jnp.bfloat16
    wanted = jax.jit(reference.causal_attention)(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert_close(o.astype(jnp.float32), wanted, tolerance=1e-2)
