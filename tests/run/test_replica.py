"""What crosses `replica`, the axis of slow links: gradients, once a step and as they rest, however
many microbatches, parts and layers there are; and what comes out is what it would be without.
"""

from typing import Any

import jax
import numpy as np
import pytest
from meshes import hlo, on, put
from reference import assert_close

from jaxmoe import tree
from jaxmoe.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    TrainConfig,
    replace,
)
from jaxmoe.kernels import exchange
from jaxmoe.model.lm import lm_loss
from jaxmoe.plan.collectives import Row, collectives
from jaxmoe.plan.hardware import find
from jaxmoe.plan.hlo import parse
from jaxmoe.plan.traffic import flows
from jaxmoe.run.state import abstract_state, init_state
from jaxmoe.run.step import Batch, abstract_batch, eval_step, gradients, train_step

B, L = 16, 16
MODEL = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_ff=32,
    n_experts=4,
    top_k=2,
    loss_chunk=16,
    router=RouterConfig(load_balance_coef=0.1),
)
AXES = {"replica": 2, "data": 2, "stage": 2}
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(batch_size=B, seq_len=L),
    mesh=MeshConfig(**AXES, microbatches=4),
)
IN_PARTS = replace(
    CONFIG,
    train=replace(CONFIG.train, accumulate=2),
    mesh=MeshConfig(replica=2, data=2),
)
CASES = {
    "in a pipeline": CONFIG,
    "in parts": IN_PARTS,
    "in parts, the optimiser's state over replicas": replace(
        IN_PARTS, optim=OptimConfig(shard_over_replica=True)
    ),
}
# Of the gradients: losses, weights and what the routers did, added up beside them.
SMALL = 0.02


@pytest.fixture(autouse=True)
def _one_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CAPACITY_FACTORS", (1.25,))  # each costs compile time


def over_replicas(run: Any, config: Config, argument: Any = lambda state: state) -> list[Row]:
    """What the compiled step sends over `replica`, alone or with other axes."""
    mesh = on(**axes_of(config))
    with jax.set_mesh(mesh):
        state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
        lowered = run.lower(argument(state), batch, config)
        text = hlo(lowered.compile())
    return [row for row in collectives(parse(text), mesh.shape) if "replica" in row.axes]


def axes_of(config: Config) -> dict[str, int]:
    return {axis: getattr(config.mesh, axis) for axis in AXES}


def gradient_bytes(config: Config) -> int:
    """float32, of one device."""
    mesh = on(**axes_of(config))
    params = jax.tree.leaves(abstract_state(config, mesh).params)
    return sum(4 * int(np.prod(a.sharding.shard_shape(a.shape))) for a in params)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "in parts" else ()) for n in CASES]
)
def test_gradients_cross_replicas_once_a_step(name: str) -> None:
    config = CASES[name]
    crossing = over_replicas(train_step, config)
    assert not any(row.unknown for row in crossing)
    once = gradient_bytes(config)
    with_others = [row for row in crossing if row.axes != ("replica",)]
    assert sum(row.bytes for row in with_others) < SMALL * once, with_others
    kinds = ["all-reduce"]
    if config.optim.shard_over_replica:  # gradients there, updates back
        kinds = ["reduce-scatter", "all-gather"]
    for kind in kinds:
        assert sum(r.bytes for r in crossing if r.kind == kind) == pytest.approx(once, rel=SMALL)
    assert sum(r.bytes for r in crossing) <= (len(kinds) + SMALL) * once, crossing
    # And the plan says so.
    sizes = dict(on(**axes_of(config)).shape)
    listed = [f for f in flows(config, sizes, find("h100")) if "replica" in f.axes]
    assert [flow.axes for flow in listed] == [("replica",)] and not listed[0].hidden
    assert sum(row.sent for row in crossing) == pytest.approx(listed[0].sent, rel=SMALL)


def test_an_evaluation_sends_sums_alone() -> None:
    crossing = over_replicas(eval_step, CONFIG, lambda state: state.params)
    assert 0 < sum(row.bytes for row in crossing) < SMALL * gradient_bytes(CONFIG), crossing
    assert {row.kind for row in crossing} == {"all-reduce"}


@pytest.mark.parametrize(
    ("scope", "axis"),
    [pytest.param("microbatch", "data", marks=pytest.mark.slow), ("global", "expert")],
)
def test_replicas_by_themselves_are_the_batch_as_one(scope: Any, axis: str) -> None:
    """Losses, statistics and gradients with a sum over `replica` at the end are those of a program
    that has `replica` as one more axis of the batch; jitter and padding included. Replicas go
    different ways: the experts' buffers overflow in one alone."""
    router = RouterConfig(load_balance_coef=0.3, load_balance_scope=scope, z_coef=0.05, jitter=0.2)
    model = replace(MODEL, z_loss_coef=0.01, router=router, remat="none")
    config = Config(model=model, train=CONFIG.train)
    mesh = on(replica=2, **{axis: 2})

    def whole(params: Any, batch: Batch, key: Any) -> Any:
        arrays = batch.inputs(), batch.targets(), batch.weights_BL
        sums, stats = lm_loss(params, *arrays, model, batch.documents_BL, key)
        return sums.total / sums.weight, (sums, stats)

    with jax.set_mesh(mesh):
        params, key = init_state(config, mesh).params, jax.random.key(5)
        given = params, put(mesh, uneven())
        wanted, want = jax.jit(jax.grad(whole, has_aux=True))(*given, key)
        grads, got = jax.jit(gradients, static_argnums=2)(*given, config, key)
    for (leaf, a), b in zip(tree.named_leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert_close(a, b, name=leaf)
    if axis == "expert":
        assert max(got[1].router.overflow) == 0.5
    got, want = (comparable(found) for found in (got, want))
    for (leaf, a), b in zip(tree.named_leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=leaf)


def comparable(found: Any) -> Any:
    """What the layout must not change: overflow it does, and sums are over other passes."""
    sums, stats = found
    return sums, replace(stats.router, overflow=None), stats.mtp_nll


def uneven() -> Batch:
    """The rows of one replica are all of one token, weigh more, and have less padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (B, L + 1)).astype(np.int32)
    tokens[: B // 2] = 7
    documents = np.sort(rng.integers(1, 4, (B, L)), axis=1).astype(np.int32)
    documents[B // 2 :, L // 2 :] = 0
    weights = rng.choice([0.0, 0.5, 1.0], (B, L)).astype(np.float32) * (documents > 0)
    return Batch(tokens, weights, documents)
