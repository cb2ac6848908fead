"""The pipeline's schedule, and that it gives what the same layers give one after another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import hlo, on, put

from jaxmoe.config import Config as WholeConfig
from jaxmoe.config import MeshConfig, ModelConfig, RouterConfig, TrainConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.mesh import BATCH, tokens
from jaxmoe.model import pipeline
from jaxmoe.model.pipeline import Schedule
from jaxmoe.plan.hlo import largest, parse
from jaxmoe.run.state import abstract_state, init_state, relaid, state_as_saved
from jaxmoe.run.step import Batch, eval_step
from jaxmoe.spec import Spec, in_rounds

LAYERS, B, L, D = 8, 16, 4, 6
SCHEDULES = [(1, 1, 3), (2, 1, 1), (4, 1, 2), (4, 2, 2), (2, 4, 3), (3, 5, 1), (16, 2, 4)]


@pytest.mark.parametrize(("stages", "rounds", "groups"), SCHEDULES)
def test_every_microbatch_goes_through_all_parts_in_turn(
    stages: int, rounds: int, groups: int
) -> None:
    """By the rule in the module's docstring: each stage does its items one after another, and each
    item was done by the stage before, or for a next round by the last one, an iteration earlier."""
    plan = Schedule(stages=stages, rounds=rounds, groups=groups)
    done: dict[tuple[int, int], int] = {}  # (microbatch, part of the layers) -> iteration
    idle = 0
    for t in range(plan.iterations):
        for s in range(stages):
            i = t - s
            if not 0 <= i < plan.items:
                idle += 1
                continue
            group, within = divmod(i, rounds * stages)
            turn, slot = divmod(within, stages)
            part = turn * stages + s
            microbatch = group * stages + slot
            assert (microbatch, part) not in done
            if part:
                assert done[microbatch, part - 1] == t - 1
            done[microbatch, part] = t
    assert len(done) == plan.microbatches * stages * rounds
    assert idle == stages * (stages - 1)
    assert plan.bubble == pytest.approx(idle / (stages * plan.iterations))


@pytest.mark.parametrize(
    ("wanted", "stages", "rows", "groups"),
    [(0, 4, 8, 2), (0, 4, 1, 1), (0, 2, 3, 1), (8, 2, 12, 4), (8, 2, 6, 3), (4, 4, 7, 1)],
)
def test_microbatches_divide_the_rows(wanted: int, stages: int, rows: int, groups: int) -> None:
    plan = pipeline.schedule(MeshConfig(microbatches=wanted), stages, rows)
    assert plan.groups == groups and plan.microbatches == groups * stages


def toy(mesh_axes: dict[str, int], rounds: int, microbatches: int) -> dict[str, Any]:
    """Layers that do not commute, and know the row's ids: loss, gradients, sums, result."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(LAYERS, D, D)).astype(np.float32) * 0.3
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    ids = rng.integers(0, 5, (B, L)).astype(np.int32)
    mesh = on(**mesh_axes)
    layout = MeshConfig(rounds=rounds, microbatches=microbatches)

    def layer(x: Any, w: Any, ids: Any, common: Any) -> tuple[Any, Any]:
        y = x + jnp.tanh(jnp.einsum("bld,de->ble", x, w)) * (1 + 0.1 * ids[..., None]) + common
        return y, {"rows": jnp.float32(x.shape[0]), "x": (x**2).sum()}

    def part(w_: Any, _: Any, x: Any, ids: Any, common: Any, __: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda x, w: layer(x, w, ids, common), x, w_)

    def loss(w: Any, x: Any, ids: Any) -> Any:
        if pipeline.stages() == 1:
            y, sums = part(jax.reshard(w, P()), None, x, ids, jnp.float32(0.01), 0)
        else:
            plan = pipeline.schedule(layout, pipeline.stages(), B // mesh.size)
            y, sums = pipeline.run(part, w, None, x, ids, jnp.float32(0.01), plan)
        weight = jnp.arange(B, dtype=jnp.float32)[:, None, None]
        return (weight * y**2).sum() + 0.1 * (sums["x"] ** 2).sum(), (y, sums)

    stacked = w.reshape(rounds, -1, D, D) if rounds > 1 else w
    over = P(None, "stage") if rounds > 1 else P("stage")
    with jax.set_mesh(mesh):
        where = (over, tokens(None), tokens())
        given = [put(mesh, a, s) for a, s in zip((stacked, x, ids), where, strict=True)]
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, (y, sums)), (dw, dx) = step(*given)
    return {"loss": value, "y": y, "dw": np.asarray(dw).reshape(w.shape), "dx": dx, **sums}


@pytest.mark.parametrize(
    ("axes", "rounds", "microbatches"),
    [
        ({"stage": 4, "data": 2}, 1, 0),
        ({"stage": 2, "data": 2, "expert": 2}, 2, 4),
        ({"stage": 8}, 1, 8),
        ({"stage": 2}, 4, 16),
    ],
)
def test_stages_give_what_layers_in_a_row_give(
    axes: dict[str, int], rounds: int, microbatches: int
) -> None:
    """Results in the rows' places, gradients, and the sums of each layer over all microbatches."""
    wanted, got = toy({}, 1, 0), toy(axes, rounds, microbatches)
    n = microbatches or 2 * axes["stage"]
    # Counted: each layer saw every microbatch once, of B / n rows.
    np.testing.assert_array_equal(got["rows"], np.full(LAYERS, B))
    assert B % n == 0
    for name in ("loss", "y", "dw", "dx", "x"):
        scale = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-6 * scale, err_msg=name)


MODEL = ModelConfig(
    vocab_size=30,
    d_model=8,
    n_layers=5,
    n_heads=2,
    n_kv_heads=2,
    d_head=4,
    d_ff=6,
    n_experts=4,
    top_k=2,
    first_dense=1,
    n_mtp=1,
    loss_chunk=4,
    router=RouterConfig(balance_bias_rate=0.1),
)
CONFIG = WholeConfig(model=MODEL, train=TrainConfig(batch_size=8, seq_len=L))


def test_no_device_has_more_of_the_weights_than_its_own() -> None:
    """Neither gathered over the axes that live inside of a stage, where the pipeline begins (what
    jax_versions.py mends), nor kept once an iteration for the way back (what an item's VJP is
    for)."""
    mesh, width = on(stage=2, data=2, model=2), 128
    own = LAYERS // 2 * width * width // 2

    def layer(x: Any, weights: Any) -> tuple[Any, Any]:
        up, down = weights
        y = jnp.einsum("blf,fd->bld", jnp.tanh(x @ up), down, out_sharding=tokens(None))
        return x + y, {"x": (x**2).sum()}

    def loss(weights: Any, x: Any) -> Any:
        part = lambda w, _, x, *rest: jax.lax.scan(layer, x, w)  # noqa: E731
        plan = pipeline.schedule(MeshConfig(microbatches=4), 2, B // 4)
        y, sums = pipeline.run(part, weights, None, x, jnp.zeros((B, L)), jnp.float32(0), plan)
        return (y**2).sum() + sums["x"].sum()

    def shaped(shape: tuple[int, ...], spec: P) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    weights = (
        shaped((LAYERS, width, width), P("stage", None, "model")),
        shaped((LAYERS, width, width), P("stage", "model", None)),
    )
    with jax.set_mesh(mesh):
        x = shaped((B, L, width), tokens(None))
        text = hlo(jax.jit(jax.grad(loss)).lower(weights, x).compile())
    ((most, _),) = largest(parse(text), 1)
    assert most.elements == own, str(most)


def placed(config: WholeConfig, mesh: Any) -> Any:
    """The parameters of `CONFIG` on a mesh, in the shapes of `config`."""
    fresh = jax.tree.map(np.asarray, init_state(CONFIG, on()).params)
    with jax.set_mesh(mesh):
        wanted = abstract_state(config, mesh).params
        put_there = lambda a, b: jax.device_put(a.reshape(b.shape), b.sharding)  # noqa: E731
        return jax.tree.map(put_there, fresh, wanted)


def test_documents_and_layers_outside_of_the_pipeline() -> None:
    """A leading dense layer, a module of multi-token prediction, masks by document: the loss of an
    evaluation with fewer rows than microbatches were wanted."""
    rng = np.random.default_rng(1)
    rows = rng.integers(1, 30, (8, L + 1)).astype(np.int32)
    documents = np.sort(rng.integers(0, 3, (8, L)), axis=1).astype(np.int32)
    weights = (documents > 0).astype(np.float32)
    losses = {}
    for name, axes, layout in (
        ("one", {}, MeshConfig()),
        ("two", {"stage": 2, "data": 2}, MeshConfig(rounds=2, microbatches=16)),
    ):
        mesh, config = on(**axes), replace(CONFIG, mesh=layout)
        params = placed(config, mesh)
        with jax.set_mesh(mesh):
            batch = Batch(*put(mesh, (rows, weights, documents)))
            sums = eval_step(params, batch, config)
        losses[name] = [float(x) for x in jax.tree.leaves(sums)]
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=2e-6)


def test_a_state_moves_between_numbers_of_rounds() -> None:
    """Layers keep their order: [8] -> [2, 4] over 2 stages -> [4, 2] over 2 -> [8] over none."""
    config = replace(CONFIG, model=replace(MODEL, n_layers=9))
    state = init_state(config, on())
    wanted = jax.tree.map(np.asarray, state)
    for axes, rounds, before in (
        ({"stage": 2, "data": 2}, 2, 1),
        ({"stage": 2, "expert": 2}, 4, 2),
        ({"data": 4}, 1, 4),
    ):
        mesh, there = on(**axes), replace(config, mesh=MeshConfig(rounds=rounds))
        with jax.set_mesh(mesh):
            saved = state_as_saved(there, mesh, before)
            put_there = lambda a, b: jax.device_put(np.asarray(a), b.sharding)  # noqa: E731
            state = jax.tree.map(put_there, state, saved)
            like = abstract_state(there, mesh)
            state = relaid(state, like)
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert got.shape == want.shape and got.sharding == want.sharding
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), state, wanted)


def test_layers_that_do_not_divide_are_refused() -> None:
    specs = {"w": Spec(shape=(6, 4), axes=("layers", "norm"))}
    assert in_rounds(specs, 3)["w"].shape == (3, 2, 4)
    with pytest.raises(UserError, match=r"mesh\.rounds=4 does not divide the 6 repeats"):
        in_rounds(specs, 4)


def test_rows_stay_on_their_devices() -> None:
    """Cutting into microbatches and back is a view: no collective."""
    mesh = on(stage=2, data=4)
    plan = Schedule(stages=2, rounds=1, groups=2)
    with jax.set_mesh(mesh):
        x = put(mesh, np.zeros((B, L, D), np.float32), P(BATCH))
        f = jax.jit(lambda x: pipeline._joined(pipeline._split(x, plan) * 2))
        text = hlo(f.lower(x).compile())
    assert not any(word in text for word in ("all-", "collective-permute"))
