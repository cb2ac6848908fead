"""Chunked causal attention is softmax attention: values, gradients, and who sees whom."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import assert_close

from jaxmoe.kernels.attention import CHUNK, MAX_CHUNKS, causal_attention

N, K, H = 6, 2, 10
SCALE = 1 / math.sqrt(H)

# One position; one chunk, not full; two chunks, the last one short; more than MAX_CHUNKS chunks of
# the least size would be needed, and the length divides by nothing.
LENGTHS = (1, 37, CHUNK + 7, CHUNK * MAX_CHUNKS + 21)


def draw(length: int, batch: int = 3, n: int = N, k: int = K, u: int = H) -> tuple[Any, ...]:
    """q, k, v, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = ((n, H), (k, H), (k, u), (n, u))
    return tuple(
        jax.random.normal(key, (batch, length, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    )


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


# Windows of one position, shorter than a chunk, a chunk and one more, longer than all; with
# documents, sinks and soft caps alone and together; multi-head and multi-query; U != H.
FEATURES = {
    "window 1": (37, {"window": 1}, {}),
    "window shorter than a chunk": (CHUNK * 2 + 7, {"window": 5}, {}),
    "window over chunks": (CHUNK * 3 + 7, {"window": CHUNK + 1}, {"n": 4, "k": 4}),
    "window longer than all": (37, {"window": 38}, {}),
    "soft cap": (37, {"soft_cap": 1.5}, {"n": 3, "k": 1}),
    "documents": (CHUNK + 7, {"documents": True}, {}),
    "sinks": (37, {"sinks": True}, {"n": 4, "k": 4, "u": 6}),
    "everything": (
        CHUNK * 2 + 7,
        {"window": CHUNK - 3, "soft_cap": 2.0, "documents": True, "sinks": True},
        {"u": 14},
    ),
    "everything, in long chunks": (
        CHUNK * MAX_CHUNKS + 21,
        {"window": CHUNK + 30, "soft_cap": 2.0, "documents": True, "sinks": True},
        {"n": 2, "k": 1, "u": 4, "batch": 2},
    ),
}


def packed(batch: int, length: int) -> np.ndarray:
    """Documents of uneven lengths, others in each row, padding (0) at the end of some."""
    rng = np.random.default_rng(length)
    cuts = np.sort(rng.choice(np.arange(1, length), (batch, 3)), axis=1)
    rows = [np.searchsorted(cut, np.arange(length), side="right") + 1 for cut in cuts]
    rows[0][cuts[0][2] :] = 0
    return np.stack(rows).astype(np.int32)


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_the_plain_einsum(name: str) -> None:
    """Values, and gradients of queries, keys, values and sinks."""
    length, options, shape = FEATURES[name]
    q, k, v, ct = draw(length, **shape)
    options = {"scale": 1.3 * SCALE, **options}
    documents = packed(len(q), length) if options.pop("documents", False) else None
    args = [3 * q, k, v]
    if options.pop("sinks", False):
        args.append(jnp.linspace(-1.0, 3.0, q.shape[2]))

    @jax.jit
    def both(*args: jax.Array) -> tuple:
        def run(f: Any, q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
            return f(q, k, v, documents, sinks, **options)

        o, pull = jax.vjp(partial(run, causal_attention), *args)
        wanted, pull_wanted = jax.vjp(partial(run, reference.causal_attention), *args)
        return (o, *pull(ct)), (wanted, *pull_wanted(ct))

    got, wanted = both(*args)
    for part, g, w in zip(("o", "dq", "dk", "dv", "dsinks"), got, wanted, strict=False):
        if options.get("window") == 1 and part in ("dq", "dk"):  # a softmax over one key
            assert abs(g).max() < 1e-6
        else:
            assert_close(g, w, name=part)


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
