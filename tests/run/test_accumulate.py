"""A step in parts is the step of the big batch: gradients, losses, metrics and biases.

Weights and padding are uneven over rows, so that a mean over parts is not the mean; every loss that
can be exact is on, large enough to show.
"""

import functools
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from meshes import hlo, on, put
from reference import assert_close

from jaxmoe import mesh as mesh_lib
from jaxmoe import tree
from jaxmoe.config import Config, ModelConfig, OptimConfig, RouterConfig, TrainConfig, replace
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.model.lm import lm_loss
from jaxmoe.run.state import abstract_state, init_state
from jaxmoe.run.step import Batch, abstract_batch, train_step

B, L, STEPS = 16, 12, 3
MODEL = ModelConfig(
    vocab_size=42,
    d_model=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ff=14,
    n_experts=8,
    top_k=3,
    loss_chunk=4,
    n_mtp=1,
    router=RouterConfig(
        load_balance_coef=0.3, load_balance_scope="sequence", z_coef=0.05, balance_bias_rate=0.01
    ),
    z_loss_coef=0.01,
)
CONFIG = Config(
    model=MODEL,
    optim=OptimConfig(warmup_steps=2, clip=0.5),
    train=TrainConfig(steps=STEPS, batch_size=B, seq_len=L),
)
LAYOUTS = {
    "one": {},
    "data8": {"data": 8},
    "expert8": {"expert": 8},
    "replica2_data2_model2": {"replica": 2, "data": 2, "model": 2},
}


SHARED = ("replica2_data2_model2",)  # each replica has its part of the optimiser's state


@functools.cache
def batches(padded: bool) -> tuple[Batch, ...]:
    """Documents of several lengths; padding of up to half a row, more of it in later rows."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        tokens = rng.integers(0, MODEL.vocab_size, (B, L + 1)).astype(np.int32)
        weights = rng.choice([0.0, 0.5, 1.0], (B, L), p=[0.2, 0.3, 0.5]).astype(np.float32)
        weights[3] = 0
        documents = 1 + np.cumsum(rng.random((B, L)) < 0.2, axis=1).astype(np.int32)
        for row in range(B):
            documents[row, L - rng.integers(0, row // 2 + 1) :] = 0
        weights[documents == 0] = 0
        found.append(Batch(tokens, weights, documents if padded else None))
    return tuple(found)


@functools.cache
def run(layout: str, parts: int, padded: bool = True) -> dict[str, Any]:
    """What a few steps leave behind, as numpy."""
    config = replace(CONFIG, train=replace(CONFIG.train, accumulate=parts))
    config = replace(config, optim=replace(CONFIG.optim, shard_over_replica=layout in SHARED))
    mesh = on(**LAYOUTS[layout])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh))
        state = jax.device_put(jax.tree.map(np.asarray, start()), placed)
        steps, first = [], None
        for batch in batches(padded):
            state, metrics = train_step(state, put(mesh, batch), config)
            steps.append(jax.tree.map(np.asarray, metrics))
            # Adam's first moment after one step: the gradient, clipped, times 1 - beta1.
            first = first or jax.tree.map(np.array, optax.tree.get(state.opt_state, "mu"))
    biases = [a for n, a in tree.named_leaves(state.params) if n.endswith("balance_bias_E")]
    return {"steps": steps, "first": first, "biases": jax.tree.map(np.asarray, biases)}


@functools.cache
def start() -> Any:
    return init_state(CONFIG, on())


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    wanted = dict(tree.named_leaves(want["first"]))
    for name, moment in tree.named_leaves(got["first"]):
        if not name.endswith("balance_bias_E"):  # no gradient
            assert_close(moment, wanted[name], name=name)
    for mine, theirs in zip(got["steps"], want["steps"], strict=True):
        for (name, a), b in zip(tree.named_leaves(mine), jax.tree.leaves(theirs), strict=True):
            if name.split("/")[-1] != "overflow":
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=name)
    for mine, theirs in zip(got["biases"], want["biases"], strict=True):
        assert np.ptp(theirs) > 0.01
        np.testing.assert_allclose(mine, theirs, atol=1e-7)


@pytest.mark.parametrize(("parts", "padded"), [(2, True), (8, False)])
def test_parts_make_the_big_batch(parts: int, padded: bool) -> None:
    want = run("one", 1, padded)
    norms = [float(m.grad_norm) for m in want["steps"]]
    assert min(norms) > CONFIG.optim.clip, "clipping is to be seen too"
    assert_same(run("one", parts, padded), want)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_parts_make_the_big_batch_on_every_mesh(layout: str) -> None:
    assert_same(run(layout, 2), run("one", 1))


def test_a_loss_over_all_rows_is_the_mean_over_parts() -> None:
    """Scope "global": each part's own, weighted by its tokens. The loads stay exact."""
    router = replace(MODEL.router, load_balance_scope="global")
    model = replace(MODEL, router=router)
    config = replace(CONFIG, model=model, train=replace(CONFIG.train, accumulate=2))
    batch = batches(True)[0]
    halves = [jax.tree.map(lambda a, s=s: a[s], batch) for s in (slice(0, 8), slice(8, 16))]
    tokens = np.array([(half.documents_BL > 0).sum() for half in halves], np.float64)
    assert tokens[0] > 1.1 * tokens[1]
    with jax.set_mesh(on()):
        params = init_state(CONFIG, on()).params
        each = []
        for half in halves:
            half = put(on(), half)
            given = (params, half.inputs(), half.targets(), half.weights_BL, model)
            each.append(jax.jit(lm_loss, static_argnums=4)(*given, half.documents_BL)[1].router)
        _, metrics = train_step(init_state(CONFIG, on()), put(on(), batch), config)
    means = [np.average([np.asarray(s.load_balance) for s in each], axis=0, weights=tokens)]
    np.testing.assert_allclose(metrics.router.load_balance, means[0], rtol=1e-5)
    whole = run("one", 1)["steps"][0].router
    np.testing.assert_allclose(metrics.router.load_E, whole.load_E, rtol=1e-5)


def test_every_device_cuts_its_own_rows() -> None:
    """No row moves, and none is lost or doubled."""
    mesh = on(data=4, expert=2)
    rows = np.arange(B * 3, dtype=np.int32).reshape(B, 3)
    with jax.set_mesh(mesh):
        cut = jax.jit(functools.partial(mesh_lib.in_parts, parts=2))
        placed = put(mesh, rows)
        parts = cut(placed)
        text = hlo(cut.lower(placed).compile())
    assert parts.shape == (2, B // 2, 3)
    assert {shard.data.shape for shard in parts.addressable_shards} == {(2, 1, 3)}
    assert not re.search(r"all-to-all|all-gather|all-reduce|collective-permute", text)
    np.testing.assert_array_equal(np.sort(np.asarray(parts).reshape(B, 3)[:, 0]), rows[:, 0])


def test_activations_are_those_of_one_part() -> None:
    """Temporary memory falls with the number of parts; one buffer of gradients is added."""

    def temporaries(parts: int) -> int:
        train = TrainConfig(batch_size=64, seq_len=48, accumulate=parts)
        config = replace(CONFIG, train=train)
        with jax.set_mesh(on()):
            batch = abstract_batch(config, on())
            lowered = train_step.lower(abstract_state(config, on()), batch, config)
            analysis: Any = lowered.compile().memory_analysis()
            return analysis.temp_size_in_bytes

    assert temporaries(8) < 0.35 * temporaries(1)


ROWS_OF_ONE = jax.NamedSharding(on(), jax.P(mesh_lib.BATCH))


def test_a_batch_that_does_not_divide_into_parts_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.accumulate=3 does not divide train\.batch_size"):
        check(replace(CONFIG, train=replace(CONFIG.train, accumulate=3)))
    mesh_lib.check_batch(on(data=4), "train.batch_size", B, 4)
    with pytest.raises(UserError, match=r"=16 in train\.accumulate=4 parts .* data=8"):
        mesh_lib.check_batch(on(data=8), "train.batch_size", B, 4)
