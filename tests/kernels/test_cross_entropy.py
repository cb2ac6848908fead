"""The chunked loss is the plain one over full logits, and full logits never exist."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P
from meshes import ROWS, hlo, on, put
from reference import assert_close

from jaxmoe.kernels.cross_entropy import cross_entropy

B, L, D, V = 3, 24, 10, 70
Z = 0.02

Args = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def draw(dtype: Any = jnp.float32) -> Args:
    rng = np.random.default_rng(1)
    weights = rng.uniform(0, 2, (B, L)) * (rng.uniform(size=(B, L)) < 0.7)
    return (
        jnp.asarray(rng.normal(size=(B, L, D)), dtype),
        jnp.asarray(rng.normal(size=(D, V)), dtype),
        jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


CAP = 4.0  # logits reach three times that


@partial(jax.jit, static_argnums=(1, 2))
def fused(args: Args, chunk: int, soft_cap: float | None = None) -> Any:
    """(total, nll, z, weight), gradients of 3 * total in x and head."""

    def f(x: jax.Array, head: jax.Array) -> Any:
        sums = cross_entropy(x, head, *args[2:], chunk=chunk, z_coef=Z, soft_cap=soft_cap)
        return 3 * sums.total, sums

    (_, s), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(*args[:2])
    return (s.total, s.nll, s.z, s.weight), grads


@partial(jax.jit, static_argnums=1)
def plain(args: Args, soft_cap: float | None = None) -> Any:
    def f(x: jax.Array, head: jax.Array) -> Any:
        total, nll, z = reference.cross_entropy(x, head, *args[2:], Z, soft_cap)
        return 3 * total, (total, nll, z, args[3].sum())

    (_, sums), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(*args[:2])
    return sums, grads


@pytest.mark.parametrize(("chunk", "soft_cap"), [(1, None), (8, None), (24, None), (8, CAP)])
def test_equals_full_logits_for_every_chunk_size(chunk: int, soft_cap: float | None) -> None:
    """With a cap on the logits too, which changes a lot."""
    args = draw()
    (sums, grads), (wanted, wanted_grads) = fused(args, chunk, soft_cap), plain(args, soft_cap)
    uncapped = plain(args)[0][0]
    assert soft_cap is None or abs(wanted[0] - uncapped) > 0.1 * uncapped
    for name, got, want in zip(("total", "nll", "z", "weight"), sums, wanted, strict=True):
        assert_close(got, want, name=name)
    for name, got, want in zip(("dx", "dhead"), grads, wanted_grads, strict=True):
        assert_close(got, want, name=name)
    left_out = np.asarray(args[3]) == 0
    assert left_out.any() and (np.asarray(grads[0])[left_out] == 0).all()


def test_sums_add_up_over_batches() -> None:
    """Sums of two halves are the sums of the whole, for weights however uneven."""
    x, head, targets, weights = draw()
    whole, _ = fused((x, head, targets, weights), 8)
    halves = [fused((x[i:j], head, targets[i:j], weights[i:j]), 8)[0] for i, j in ((0, 1), (1, 3))]
    for a, b, want in zip(*halves, whole, strict=True):
        assert_close(a + b, want)


def test_bfloat16_inputs_keep_a_float32_loss() -> None:
    args = draw(jnp.bfloat16)
    sums, (dx, dhead) = fused(args, 8)
    assert [s.dtype for s in sums] == [jnp.float32] * 4
    assert dx.dtype == dhead.dtype == jnp.bfloat16
    x, head, *rest = args
    wanted, (want_dx, want_dhead) = plain((x.astype(jnp.float32), head.astype(jnp.float32), *rest))
    assert_close(sums[0], wanted[0])  # products of bfloat16 are exact in float32
    assert_close(dx.astype(jnp.float32), want_dx, tolerance=2**-7)
    assert_close(dhead.astype(jnp.float32), want_dhead, tolerance=2**-7)


def test_a_sharded_vocabulary_gives_the_same() -> None:
    mesh = on(data=3, model=2)
    args = draw()
    with jax.set_mesh(mesh):
        sums, grads = fused(put(mesh, args, (ROWS, P(None, "model"), ROWS, ROWS)), 8)
        assert grads[1].addressable_shards[0].data.shape == (D, V // 2)
    wanted, wanted_grads = plain(args)
    for got, want in zip((*sums, *grads), (*wanted, *wanted_grads), strict=True):
        assert_close(got, want)


@partial(jax.jit, static_argnums=2)
def by_source(args: Args, sources: jax.Array, differentiated: bool) -> Any:
    """(nll_Y, weight_Y); of the forward pass, or as the pass with gradients has them."""

    def f(x: jax.Array) -> Any:
        sums = cross_entropy(x, *args[1:], chunk=4, z_coef=Z, sources_BY=sources)
        return sums.total, (sums.nll_Y, sums.weight_Y)

    return jax.value_and_grad(f, has_aux=True)(args[0])[0][1] if differentiated else f(args[0])[1]


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("context", [1, 2])
def test_sums_by_source_are_those_of_its_sequences(differentiated: bool, context: int) -> None:
    """A sequence may count in part; on one device, and spread over rows and positions."""
    args = draw()
    sources = jnp.asarray([[1.0, 0.0], [0.0, 0.5], [0.25, 1.0]], jnp.float32)
    rows = [
        fused(tuple(a if i == 1 else a[b : b + 1] for i, a in enumerate(args)), 4)[0]
        for b in range(B)
    ]
    wanted = [sources.T @ jnp.stack([row[i] for row in rows]) for i in (1, 3)]
    mesh = on(data=3, context=context)
    over = P(ROWS[0], "context")
    with jax.set_mesh(mesh):
        spread = put(mesh, args, (P(*over, None), P(), over, over))
        told = put(mesh, (sources,), (ROWS,))[0]
        found = by_source(spread, told, differentiated)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want)
    for got, want in zip(by_source(args, sources, differentiated), wanted, strict=True):
        assert_close(got, want)


def largest_array(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred|u32)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_array_of_all_logits_exists() -> None:
    """In the compiled loss and gradient the largest array is one chunk's logits."""
    args = draw()
    logits = B * L * V
    assert largest_array(hlo(plain.lower(args).compile())) >= logits
    assert largest_array(hlo(fused.lower(args, 4).compile())) <= max(logits * 4 // L, B * L * D)
