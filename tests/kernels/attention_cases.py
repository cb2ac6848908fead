"""Inputs for attention, and the comparison of a path with the plain einsum."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from reference import assert_close

from jaxmoe.kernels.attention import CHUNK, LONG

N, K, H = 6, 2, 10
SCALE = 1 / math.sqrt(H)


def draw(length: int, batch: int = 3, n: int = N, k: int = K, u: int = H) -> tuple[Any, ...]:
    """q, k, v, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = ((n, H), (k, H), (k, u), (n, u))
    return tuple(
        jax.random.normal(key, (batch, length, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    )


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
    "everything, in all chunks": (
        LONG - 3,
        {"window": CHUNK + 30, "soft_cap": 2.0, "documents": True, "sinks": True},
        {"n": 2, "k": 1, "u": 4, "batch": 2},
    ),
    "everything, beyond chunks": (
        LONG + 21,
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


def features_equal_the_plain_einsum(
    attend: Callable[..., Any], length: int, options: dict[str, Any], shape: dict[str, int]
) -> None:
    """Values, and gradients of queries, keys, values and sinks."""
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

        o, pull = jax.vjp(partial(run, attend), *args)
        wanted, pull_wanted = jax.vjp(partial(run, reference.causal_attention), *args)
        return (o, *pull(ct)), (wanted, *pull_wanted(ct))

    got, wanted = both(*args)
    for part, g, w in zip(("o", "dq", "dk", "dv", "dsinks"), got, wanted, strict=False):
        if options.get("window") == 1 and part in ("dq", "dk"):  # a softmax over one key
            assert abs(g).max() < 1e-5
        else:
            assert_close(g, w, name=part)
