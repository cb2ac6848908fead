"""The mixture of experts: its router and its dropless dispatch equal the plain dense layer."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import TOKENS, on, put, put_params
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe.config import MeshConfig, ModelConfig, RouterConfig, replace
from jaxmoe.kernels import exchange
from jaxmoe.mesh import BATCH, COMPUTE, abstract, partition
from jaxmoe.model import moe as moe_lib
from jaxmoe.spec import map_specs

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
# The axes of a mesh, and whether its `model` shards have rows of their own or the same.
MESHES = {
    "one": ({}, False),
    "expert4": ({"expert": 4}, False),
    "expert2_model2": ({"expert": 2, "model": 2}, True),
    "expert2_model2_copies": ({"expert": 2, "model": 2}, False),
}
SPREAD = P(BATCH, ("context", "model"))


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
        y, sums = moe_lib.moe(p, x, CFG)
        stats = sums.means(CFG)
        return objective((y, stats.load_balance, stats.router_z))

    def plain(p: Any, x: Any) -> Any:
        y, stats = reference.moe(p, x, CFG)
        return objective((y, stats["load_balance"], stats["router_z"]))

    both = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    mesh = on()
    with jax.set_mesh(mesh):
        (_, values), grads = jax.jit(both(ours))(
            put_params(mesh, params(), moe_lib.moe_specs(CFG)), put(mesh, x, TOKENS)
        )
    (_, wanted), wanted_grads = jax.jit(both(plain))(params(), x)
    for name, got, want in zip(("y", "balance", "z"), values, wanted, strict=True):
        assert_close(got, want, name=name)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert_close(got, want)


# Dispatch

WEIGHTS = moe_lib._weights_spec(CFG)


@dataclass(frozen=True)
class Where:
    """How rows lie on a mesh."""

    mesh: Mesh
    spread: bool

    @property
    def ways(self) -> int:
        """Of `model`, over which rows are spread."""
        return self.mesh.shape["model"] if self.spread else 1

    @property
    def tokens(self) -> int:
        """That a device sends."""
        return B * L // self.mesh.shape["expert"] // self.ways

    def parts(self, ids: np.ndarray) -> np.ndarray:
        """[B, L, A] -> [expert, model, tokens, A]."""
        e, m = self.mesh.shape["expert"], self.ways
        return ids.reshape(e, B // e, m, L // m, A).swapaxes(1, 2).reshape(e, m, -1, A)

    def whole(self, parts: np.ndarray) -> np.ndarray:
        """The way back."""
        e, m = self.mesh.shape["expert"], self.ways
        return parts.reshape(e, m, B // e, L // m, A).swapaxes(1, 2).reshape(B, L, A)


def where_of(name: str) -> Where:
    axes, spread = MESHES[name]
    return Where(mesh=on(**axes), spread=spread)


def forced(load: int, where: Where) -> np.ndarray:
    """ids_BLA: one shard sends exactly `load` rows to expert 2; everything else is even."""
    tokens = where.tokens
    others = [e for e in range(E) if e != 2]
    even = np.arange(B * L * A).reshape(-1, tokens, A) % E
    ids = even.copy()
    heavy = np.array([others[i % len(others)] for i in range(tokens * A)]).reshape(tokens, A)
    heavy[:load, 0] = 2
    fill = np.array([others[i % len(others)] for i in range((A - 1) * load)])
    heavy[:load, 1:] = fill.reshape(load, A - 1)
    ids[-1] = heavy
    assert all(len(set(token)) == A for token in ids.reshape(-1, A))
    return where.whole(ids).astype(np.int32)


# (expert_path, expert_exchange)
WAYS = (
    ("batched", "all_to_all"),
    ("blocked", "all_to_all"),
    ("blocked", "all_gather"),
    ("blocked", "ragged"),
    ("kernel", "all_to_all"),
    ("kernel", "all_gather"),
)
# Of those where all shards of `model` send the same rows.
COPIES = (("batched", "all_to_all"), ("blocked", "ragged"))


def sizes_on(where: Where, cfg: ModelConfig) -> tuple[list[int], int]:
    """Compiled sizes, and what always suffices."""
    shards, tokens = where.mesh.shape["expert"], where.tokens
    kind = moe_lib.exchange_of(cfg, tokens, shards)
    if kind == "all_gather":
        tokens *= where.ways
    args = (kind, tokens, shards, E, A)
    return exchange.sizes(*args), exchange.most(*args)


def size_for(ids: np.ndarray, where: Where, cfg: ModelConfig) -> int:
    """The smallest compiled size that holds the loads, counted plainly; 0: none does."""
    shards, (sizes, _) = where.mesh.shape["expert"], sizes_on(where, cfg)
    kind = moe_lib.exchange_of(cfg, where.tokens, shards)
    parts = where.parts(ids)
    if kind == "all_to_all":  # of an expert, from each shard
        loads = [np.bincount(part.ravel()) for of_model in parts for part in of_model]
    elif kind == "ragged":  # of a device's experts, from its peers, the same of `model`
        loads = [np.bincount(part.ravel() // (E // shards)) for part in parts.swapaxes(0, 1)]
    else:
        loads = [np.bincount(ids.ravel() // (E // shards))]
    largest = max(load.max() for load in loads)
    return next((size for size in sizes if size >= largest), 0)


def cases(where: Where, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Forced ids, by name."""
    most = where.tokens
    sizes = [*exchange.sizes("all_to_all", most, 1, E, A), most]
    rng = np.random.default_rng(3)
    three = np.stack([rng.permutation([1, 4, 6]) for _ in range(B * L)])
    low = np.stack([rng.permutation(4)[:A] for _ in range(B * L)])
    even = (np.arange(B * L * A) % E).reshape(B, L, A).astype(np.int32)
    mixed = even.copy()
    mixed[0] = low[:L]
    slots = {f"just fits {c}": forced(c, where) for c in sizes}
    slots |= {f"one more than {c}": forced(c + 1, where) for c in sizes[:-1]}
    return {
        "balanced": even,
        **(slots if cfg.expert_exchange == "all_to_all" else {}),
        "a bit uneven": mixed,
        "five empty": three.reshape(B, L, A).astype(np.int32),
        "few shards have all": low.reshape(B, L, A).astype(np.int32),
    }


@partial(jax.jit, static_argnums=0)
def dispatched(cfg: ModelConfig, x: Any, weights: Any, ids: Any, w: Any, ct: Any) -> Any:
    y, pull, overflow = jax.vjp(
        lambda x, weights, w: moe_lib.experts(cfg, x, weights, ids, w), x, weights, w, has_aux=True
    )
    return y, pull(ct), overflow


@jax.jit
def plainly(x: Any, weights: Any, ids: Any, w: Any, ct: Any) -> Any:
    y, pull = jax.vjp(
        lambda x, weights, w: reference.experts(x, weights, ids, w, CFG), x, weights, w
    )
    return y, pull(ct)


@partial(jax.jit, static_argnums=0)
def size_taken(cfg: ModelConfig, ids: Any) -> Any:
    """The size that the switch runs with, on every device; 0: several rounds."""

    def run(_: str, size: int, first: Any = None) -> Any:
        return jnp.int32(size if first is None else 0)

    def report(ids_blA: Any) -> Any:
        order = moe_lib._order(cfg, ids_blA)
        size, _ = moe_lib._switch(cfg, order, run, jnp.int32(0))
        return jnp.full_like(ids_blA, size)

    spec = P(*jax.typeof(ids).sharding.spec)
    return jax.shard_map(report, in_specs=spec, out_specs=spec)(ids)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("name", MESHES)
def test_dispatch_equals_every_expert_for_every_token(
    name: str, way: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients, whatever the load, through each compiled size."""
    if "model2" in name:  # twice a balanced load is all that two shards can get
        monkeypatch.setattr(exchange, "CAPACITY_FACTORS", (1.25, 1.75))
    where, cfg = where_of(name), replace(CFG, expert_path=way[0], expert_exchange=way[1])
    if name == "one" and way[1] in ("all_gather", "ragged"):
        pytest.skip("nothing travels on one device")
    if "copies" in name and way not in COPIES:
        pytest.skip("the rows are those of the other ways")
    mesh, rows_spec = where.mesh, SPREAD if where.spread else TOKENS
    x, weights, ct = rows(4, B, L, D), rows(5, B, L, A), rows(6, B, L, D)
    w = params().experts
    taken, (sizes, most) = set(), sizes_on(where, cfg)
    for case, ids in cases(where, cfg).items():
        with jax.set_mesh(mesh):
            specs = (rows_spec, rows_spec, rows_spec, WEIGHTS, rows_spec)
            args = put(mesh, (x, weights, ids, w, ct), specs)
            *got, overflow = dispatched(cfg, *args)
            ran = np.unique(size_taken(cfg, args[2]))
        assert ran.tolist() == [size_for(ids, where, cfg)], case
        assert float(overflow) == (ran[0] != sizes[0]), case
        taken.add(int(ran[0]))
        want = plainly(x, weights, ids, w, ct)
        for part, g, v in zip(
            ("y", "dx", "dweights", "dgate", "dup", "ddown", "dbgate", "dbup", "dbdown"),
            jax.tree.leaves(got),
            jax.tree.leaves(want),
            strict=True,
        ):
            assert_close(g, v, name=f"{case}: {part}")
    several = {0} if sizes[-1] < most else set()
    assert several or name == "one"
    assert {sizes[0]} | several <= taken
    assert way[1] != "all_to_all" or taken == set(sizes) | several


def test_sizes_are_no_larger_than_what_always_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where factors round past the shard, or tokens are fewer than a rounding step."""
    for tokens in (1, 7, 8, 40, 1000):
        for e, a in ((8, 3), (4, 4), (64, 1)):
            found = exchange.sizes("all_to_all", tokens, 4, e, a)
            assert found == sorted(set(found)) and found[-1] <= tokens
            assert len(found) <= len(exchange.CAPACITY_FACTORS)
            for kind in ("all_gather", "ragged"):
                assert exchange.sizes(kind, tokens, 4, e, a)[-1] <= tokens * 4 * min(a, e // 4)
    monkeypatch.setattr(exchange, "CAPACITY_FACTORS", (1.25, 2.0))
    # Times a mean load of 60, in eights; and of 480 rows a device.
    assert exchange.sizes("all_to_all", 160, 4, 8, 3) == [80, 120]
    assert exchange.sizes("all_gather", 160, 4, 8, 3) == [600, 960]


@pytest.mark.parametrize(("length", "own"), [(L, True), (L + 1, False)])
def test_shards_of_model_send_their_own_rows_where_they_divide(length: int, own: bool) -> None:
    """What an all-to-all over `expert` carries, and where the output is."""
    mesh = abstract(MeshConfig(data=1, expert=2, model=2), 4)
    x = jax.ShapeDtypeStruct((B, length, D), jnp.float32, sharding=NamedSharding(mesh, TOKENS))
    weights = map_specs(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, jnp.float32, sharding=NamedSharding(mesh, partition(s, COMPUTE))
        ),
        moe_lib.moe_specs(CFG),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(partial(moe_lib.moe, cfg=CFG)).trace(weights, x)
    y, _ = traced.out_info
    assert y.sharding.spec[1] == (("context", "model") if own else "context")
    slots = exchange.sizes("all_to_all", B * length // (4 if own else 2), 2, E, A)[0]
    assert f"f32[2,{E // 2},{slots},{D}]" in str(traced.jaxpr)


def test_rows_go_the_way_that_moves_fewer() -> None:
    """8 shards of 1,000 tokens: gathering moves 7,000 rows, slots 7/8 of 1.25 times the choices."""
    assert exchange.cheapest(1000, 1, 8, 2) == "local"
    assert exchange.cheapest(1000, 8, 64, 2) == "all_to_all"
    assert exchange.cheapest(1000, 8, 64, 8) == "all_gather"
    assert exchange.cheapest(1000, 64, 64, 8) == "all_to_all"
