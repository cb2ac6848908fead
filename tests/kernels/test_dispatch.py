"""Rows to slots and back: the gathers equal scatters, and each one's VJP is the true one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from jaxmoe.kernels import dispatch

T, A, E, D = 29, 3, 8, 10


def ids_of(kind: str) -> np.ndarray:
    """[T, A], the experts of a token all different."""
    rng = np.random.default_rng(5)
    if kind == "balanced":
        return (np.arange(T * A).reshape(T, A) % E).astype(np.int32)
    if kind == "overfull":  # all choose expert 6 first
        return np.stack([[6, *rng.permutation(6)[: A - 1]] for _ in range(T)]).astype(np.int32)
    if kind == "empty":  # all choose among the same three
        return np.stack([rng.permutation([1, 4, 7]) for _ in range(T)]).astype(np.int32)
    return np.stack([rng.permutation(E)[:A] for _ in range(T)]).astype(np.int32)


def placement(ids: np.ndarray, capacity: int) -> np.ndarray:
    """The slot of each choice, counted one by one; E * C where there is none left."""
    taken, slots = [0] * E, np.full(ids.shape, E * capacity)
    for token, choice in np.ndindex(ids.shape):
        expert = ids[token, choice]
        if taken[expert] < capacity:
            slots[token, choice] = expert * capacity + taken[expert]
        taken[expert] += 1
    return slots


def make_plan(ids: Any, n_experts: int, capacity: int) -> dispatch.Plan:
    return dispatch.slot_plan(dispatch.make_order(jnp.asarray(ids), n_experts), ids, capacity)


KINDS = ("balanced", "overfull", "empty", "random")


def capacity_of(kind: str) -> int:
    """Exactly the largest load: not a slot more than is needed."""
    return int(np.bincount(ids_of(kind).ravel(), minlength=E).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [0, 3, -2])
def test_plan_fills_slots_in_order(kind: str, change: int) -> None:
    """Every choice has its slot and every slot its token; what is too much has none."""
    ids, capacity = ids_of(kind), capacity_of(kind) + change
    plan = jax.jit(make_plan, static_argnums=(1, 2))(ids, E, capacity)
    slots = placement(ids, capacity)
    np.testing.assert_array_equal(plan.slot_tA, slots)
    tokens = np.full(E * capacity + 1, T)
    tokens[slots.ravel()] = np.repeat(np.arange(T), A)
    np.testing.assert_array_equal(plan.token_S, tokens[:-1])
    load = jax.jit(dispatch.expert_load, static_argnums=1)(ids, E)
    np.testing.assert_array_equal(load, np.bincount(ids.ravel(), minlength=E))


@partial(jax.jit, static_argnums=4)
def both_ways(x: Any, y: Any, weights: Any, ids: Any, capacity: int, cts: Any) -> Any:
    """Values and gradients of both gathers, and of their plain scatters by autodiff."""
    plan = make_plan(ids, E, capacity)
    size = E * capacity

    def scatter(x: Any) -> Any:
        rows = jnp.repeat(x, A, axis=0)
        return jnp.zeros((size, D)).at[plan.slot_tA.reshape(-1)].add(rows, mode="drop")

    def combine(y: Any, weights: Any) -> Any:
        return jnp.einsum("tAD,tA->tD", y[plan.slot_tA], weights)

    def value_and_pull(f: Any, ct: Any, *args: Any) -> Any:
        value, pull = jax.vjp(f, *args)
        return value, *pull(ct)

    got = (
        *value_and_pull(lambda x: dispatch.to_slots(x, plan), cts[0], x),
        *value_and_pull(lambda y, w: dispatch.from_slots(y, w, plan), cts[1], y, weights),
    )
    want = (
        *value_and_pull(scatter, cts[0], x),
        *value_and_pull(combine, cts[1], y, weights),
    )
    return got, want


@pytest.mark.parametrize("kind", KINDS)
def test_gathers_equal_scatters_with_their_gradients(kind: str) -> None:
    capacity = capacity_of(kind)
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    cts = normal(E * capacity, D), normal(T, D)
    args = normal(T, D), normal(E * capacity, D), normal(T, A)
    got, want = both_ways(*args, ids_of(kind), capacity, cts)
    for name, g, w in zip(("x_SD", "dx", "y_tD", "dy", "dweights"), got, want, strict=True):
        assert_close(g, w, name=f"{kind} {name}")


def test_rows_are_added_in_float32() -> None:
    """bfloat16 in and out, but a token's rows add up exactly: 1 + 2**-9 - 1 is no zero."""
    ids = jnp.array([[0, 1, 2]], jnp.int32)
    plan = jax.jit(make_plan, static_argnums=(1, 2))(ids, 3, 1)
    y = jnp.array([[1.0], [2**-9], [-1.0]], jnp.bfloat16)
    assert dispatch.from_slots(y, jnp.ones((1, 3)), plan).item() == 2**-9
    _, pull = jax.vjp(lambda x: dispatch.to_slots(x, plan), jnp.zeros((1, 1), jnp.bfloat16))
    (dx,) = pull(y)
    assert dx.dtype == jnp.bfloat16 and dx.item() == 2**-9


@pytest.mark.parametrize("n_experts", [7, 1 << 25])
def test_the_order_has_every_choice_once(n_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a key would not hold expert and choice."""
    monkeypatch.setattr(dispatch, "expert_load", lambda ids, n: jnp.bincount(ids.ravel(), length=7))
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(7), (40, 1)), axis=1)[:, :3]
    order = dispatch.make_order(jnp.asarray(ids, jnp.int32), n_experts)
    wanted = np.argsort(ids.ravel(), kind="stable")
    np.testing.assert_array_equal(order.choice_S, wanted)
    there_and_back = np.asarray(order.choice_S)[order.place_tA.ravel()]
    np.testing.assert_array_equal(there_and_back, np.arange(120))
    np.testing.assert_array_equal(order.load_E, np.bincount(ids.ravel()))
