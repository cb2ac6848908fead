"""The mixture of experts: its router and its dropless dispatch equal the plain dense layer."""

import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import ROWS, on, put, put_params
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe.config import ModelConfig, RouterConfig, replace
from jaxmoe.model import moe as moe_lib

CFG = ModelConfig(
    d_model=10,
    d_ff=14,
    n_experts=8,
    top_k=3,
    expert_bias=True,
    expert_path="batched",
    router=RouterConfig(bias=True, n_groups=2, top_k_groups=2),
)
B, L, D, E, A = 4, 40, 10, 8, 3
MESHES = {"one": {}, "expert4": {"expert": 4}, "expert2_model2": {"expert": 2, "model": 2}}


@functools.cache
def params() -> Any:
    drawn = spec_lib.init(moe_lib.moe_specs(CFG), jax.random.key(0))
    # Uneven experts: the load-balance loss has a gradient, and experts cannot be mixed up. Biases
    # start at zero, and would not be seen.
    rng = np.random.default_rng(7)

    def uneven(a: Any) -> np.ndarray:
        return 2 * np.asarray(a) if a.any() else rng.normal(size=a.shape).astype(np.float32)

    return jax.tree.map(uneven, drawn)


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Router


def test_router_gradient_equals_that_of_the_dense_layer() -> None:
    """Output and auxiliary losses, and their gradients in x, router and all experts' weights."""
    x, ct = rows(1, B, L, D), rows(2, B, L, D)

    def objective(outputs: tuple) -> Any:
        y, balance, z = outputs
        return (y * ct).mean() + 0.7 * balance + 0.3 * z, outputs

    def ours(p: Any, x: Any) -> Any:
        y, stats = moe_lib.moe(p, x, CFG)
        return objective((y, stats.load_balance, stats.router_z))

    def plain(p: Any, x: Any) -> Any:
        y, stats = reference.moe(p, x, CFG)
        return objective((y, stats["load_balance"], stats["router_z"]))

    both = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    mesh = on()
    with jax.set_mesh(mesh):
        (_, values), grads = jax.jit(both(ours))(
            put_params(mesh, params(), moe_lib.moe_specs(CFG)), put(mesh, x)
        )
    (_, wanted), wanted_grads = jax.jit(both(plain))(params(), x)
    for name, got, want in zip(("y", "balance", "z"), values, wanted, strict=True):
        assert_close(got, want, name=name)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert_close(got, want)


# Dispatch

WEIGHTS = moe_lib.Experts(
    wgate_EDF=P("expert", None, "model"),
    wup_EDF=P("expert", None, "model"),
    wdown_EFD=P("expert", "model"),
    bgate_EF=P("expert", "model"),
    bup_EF=P("expert", "model"),
    bdown_ED=P("expert"),
)


def forced(load: int, mesh: Mesh) -> np.ndarray:
    """ids_BLA: one shard sends exactly `load` rows to expert 2; everything else is even."""
    shards = mesh.shape["expert"]
    tokens = B * L // shards
    others = [e for e in range(E) if e != 2]
    even = np.arange(B * L * A).reshape(shards, tokens, A) % E
    ids = even.copy()
    heavy = np.array([others[i % len(others)] for i in range(tokens * A)]).reshape(tokens, A)
    heavy[:load, 0] = 2
    fill = np.array([others[i % len(others)] for i in range((A - 1) * load)])
    heavy[:load, 1:] = fill.reshape(load, A - 1)
    ids[-1] = heavy
    assert all(len(set(token)) == A for token in ids.reshape(-1, A))
    return ids.reshape(B, L, A).astype(np.int32)


def cases(mesh: Mesh) -> dict[str, tuple[np.ndarray, int]]:
    """name -> forced ids, and the capacity that should be compiled for them."""
    tokens = B * L // mesh.shape["expert"]
    sizes = moe_lib.capacities(tokens, CFG)
    rng = np.random.default_rng(3)
    three = np.stack([rng.permutation([1, 4, 6]) for _ in range(B * L)])
    even = (np.arange(B * L * A) % E).reshape(B, L, A).astype(np.int32)
    return {
        "balanced": (even, sizes[0]),
        **{f"just fits {c}": (forced(c, mesh), c) for c in sizes},
        **{
            f"one more than {c}": (forced(c + 1, mesh), after)
            for c, after in itertools.pairwise(sizes)
        },
        "five empty": (three.reshape(B, L, A).astype(np.int32), sizes[-1]),
    }


@partial(jax.jit, static_argnums=0)
def dispatched(cfg: ModelConfig, x: Any, weights: Any, ids: Any, w: Any, ct: Any) -> Any:
    y, pull = jax.vjp(
        lambda x, weights, w: moe_lib._experts(cfg, x, weights, ids, w), x, weights, w
    )
    return y, pull(ct)


@jax.jit
def plainly(x: Any, weights: Any, ids: Any, w: Any, ct: Any) -> Any:
    y, pull = jax.vjp(
        lambda x, weights, w: reference.experts(x, weights, ids, w, CFG), x, weights, w
    )
    return y, pull(ct)


@jax.jit
def capacity_taken(x: Any, ids: Any) -> Any:
    """The capacity that the switch runs with, on every device."""

    def report(_: ModelConfig, capacity: int, x_blD: Any, *__: Any) -> Any:
        return jnp.full_like(x_blD, capacity)

    switch: Any = partial(moe_lib._switch, CFG, report)
    return jax.shard_map(
        lambda x, ids: switch(x, jnp.zeros(ids.shape), ids, (), ()),
        in_specs=(ROWS, ROWS),
        out_specs=ROWS,
    )(x, ids)


@pytest.mark.parametrize("path", ["batched", "blocked"])
@pytest.mark.parametrize("where", MESHES)
def test_dispatch_equals_every_expert_for_every_token(where: str, path: Any) -> None:
    """Values and all gradients, whatever the load, through each compiled capacity."""
    mesh = on(**MESHES[where])
    x, weights, ct = rows(4, B, L, D), rows(5, B, L, A), rows(6, B, L, D)
    w = params().experts
    taken = set()
    for name, (ids, capacity) in cases(mesh).items():
        with jax.set_mesh(mesh):
            args = put(mesh, (x, weights, ids, w, ct), (ROWS, ROWS, ROWS, WEIGHTS, ROWS))
            got = dispatched(replace(CFG, expert_path=path), *args)
            ran = np.unique(capacity_taken(args[0], args[2]))
        assert ran.tolist() == [capacity], name
        taken.add(capacity)
        want = plainly(x, weights, ids, w, ct)
        for part, g, v in zip(
            ("y", "dx", "dweights", "dgate", "dup", "ddown", "dbgate", "dbup", "dbdown"),
            jax.tree.leaves(got),
            jax.tree.leaves(want),
            strict=True,
        ):
            assert_close(g, v, name=f"{name}: {part}")
    assert sorted(taken) == moe_lib.capacities(B * L // mesh.shape["expert"], CFG)


def test_the_last_capacity_always_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where factors round past the shard, or tokens are fewer than a rounding step."""
    for tokens in (1, 7, 8, 40, 1000):
        for cfg in (CFG, ModelConfig(n_experts=4, top_k=4), ModelConfig(n_experts=64, top_k=1)):
            found = moe_lib.capacities(tokens, cfg)
            assert found == sorted(set(found)) and found[-1] == tokens
            assert len(found) <= 1 + len(moe_lib.CAPACITY_FACTORS)
    monkeypatch.setattr(moe_lib, "CAPACITY_FACTORS", (1.25, 2.0))
    assert moe_lib.capacities(160, CFG) == [80, 120, 160]  # times a mean load of 60, in eights
