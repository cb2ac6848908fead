"""The optimisers' states: spread over any mesh, over replicas, saved and brought back."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from meshes import on
from optimisers import CASES, PLAIN, SPECS, advance, compiled, draw, fresh, placed, run
from reference import assert_close

from jaxmoe import tree
from jaxmoe.config import CheckpointConfig, Config, OptimConfig, replace
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.optim import relative_path
from jaxmoe.run.checkpoint import Checkpoints
from jaxmoe.run.state import TrainState

LAYOUTS = [{"data": 4, "model": 2}, {"replica": 2, "data": 2, "expert": 2}]


def assert_same(got: TrainState, want: TrainState, kind: str = "float32") -> None:
    """To 1e-5. Where rounding is stochastic another order of a sum gives some few values the next
    code; those may be off by as much as one makes."""
    pairs = zip(tree.named_leaves(got.params), jax.tree.leaves(want.params), strict=True)
    for (name, a), b in pairs:
        if kind == "float32":
            assert_close(a, b, name=name)
            continue
        a, b = np.asarray(a), np.asarray(b)
        off = np.abs(a - b) > 1e-5 * np.abs(b).max()
        assert off.mean() < 2e-3, (name, off.sum())
        np.testing.assert_allclose(a, b, atol=0.01, err_msg=name)  # the rate is 0.1


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_same_parameters_on_every_mesh(case: str, axes: dict[str, int]) -> None:
    one = run(CASES[case])
    assert np.abs(np.asarray(one.params["experts"]) - draw(0)["experts"]).max() > 0.05
    assert_same(run(CASES[case], **axes), one, CASES[case].moments)


@pytest.mark.parametrize("case", CASES)
def test_replicas_share_the_state_and_nothing_changes(case: str) -> None:
    """ZeRO stage 1: each device has half of what it had; of factored moments those that have the
    dim which is cut."""
    axes, shared = LAYOUTS[1], replace(CASES[case], shard_over_replica=True)
    apart, together = run(CASES[case], **axes), run(shared, **axes)
    assert_same(together, run(CASES[case]), shared.moments)

    def held(state: TrainState) -> int:
        device = on(**axes).devices.flat[0]
        shards = [s for a in jax.tree.leaves(state.opt_state) for s in a.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == device)

    assert held(together) < (0.75 if shared.name == "adafactor" else 0.52) * held(apart)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (together, apart)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)  # they rest as before


def test_factored_moments_are_spread_as_the_dims_that_they_have() -> None:
    moments = run(CASES["adafactor"], **LAYOUTS[0]).opt_state[1].moments
    heads, experts = moments["heads"], moments["experts"]
    assert heads.rows.shape == (3, 16, 1, 1) and heads.columns.shape == (3, 1, 4, 64)
    shard = lambda a: a.addressable_shards[0].data.shape  # noqa: E731
    assert shard(heads.rows) == (3, 4, 1, 1) and shard(heads.columns) == (3, 1, 2, 64)
    assert shard(experts.rows) == (2, 4, 4, 1) and shard(experts.columns) == (2, 4, 1, 4)
    assert moments["embed"].rows.shape == (12, 1)
    assert moments["norm"].whole.shape == SPECS["norm"].shape


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.51), ("int8", 0.4)])
def test_moments_are_smaller(kind: Any, most: float) -> None:
    def size(cfg: OptimConfig) -> int:
        return sum(a.nbytes for a in jax.tree.leaves(run(cfg).opt_state))

    assert size(CASES[f"adamw {kind}"]) < most * size(CASES["adamw"])


@pytest.mark.parametrize("case", CASES)
def test_saved_on_one_mesh_and_restored_on_another(case: str, tmp_path: Path) -> None:
    """Bit for bit; the next update is the unbroken run's on the same mesh, and to rounding on
    another, over whose replicas the state is spread."""
    cfg, first = CASES[case], on(**LAYOUTS[0])
    before = run(cfg, **LAYOUTS[0])
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), before)
    checkpoints.save(4, before, {"step": 4})
    checkpoints.close()  # on disk
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), before)
    unbroken = advance(cfg, first, before, range(5, 6))
    shared = replace(cfg, shard_over_replica=True)
    for own, mesh in ((cfg, first), (shared, on(**LAYOUTS[1]))):
        like = fresh(own, mesh)
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        restored = checkpoints.restore(abstract)
        assert restored is not None
        jax.tree.map(np.testing.assert_array_equal, restored.state, before)
        after = advance(own, mesh, restored.state, range(5, 6))
        if own is cfg:
            jax.tree.map(np.testing.assert_array_equal, after, unbroken)
        assert_same(after, unbroken, cfg.moments)
    checkpoints.close()


@pytest.mark.parametrize("case", CASES)
def test_clipping_and_schedule_hold_for_all(case: str) -> None:
    """Gradients beyond the norm are as if they had it; an update is in proportion to its rate."""
    kind = {"name": CASES[case].name, "moments": CASES[case].moments, "weight_decay": 0.0}
    plain = replace(PLAIN, **kind)
    clipped = replace(plain, clip=0.5)
    warming = replace(plain, schedule="cosine", warmup_steps=4, final_lr=0.1)
    grads = draw(1)
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    small = {name: (g * (0.5 / norm)).astype(np.float32) for name, g in grads.items()}
    rates = relative_path(warming, 20)
    with jax.set_mesh(on()):
        states = {c: fresh(c, on()) for c in (plain, clipped, warming)}
        _, wanted = compiled(plain)(states[plain], placed(on(), small))
        _, got = compiled(clipped)(states[clipped], placed(on(), grads))
        jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), got, wanted)
        for step in range(6):
            rows = placed(on(), draw(1 + step))
            states[plain], wanted = compiled(plain)(states[plain], rows)
            states[warming], got = compiled(warming)(states[warming], rows)
            scaled = jax.tree.map(lambda a, r=rates[step]: np.asarray(a) * r, wanted)
            jax.tree.map(assert_close, got, scaled)


def test_what_adafactor_cannot_do_is_refused() -> None:
    config = Config(optim=OptimConfig(name="adafactor", moments="int8"))
    with pytest.raises(UserError, match=r"optim\.moments=int8: optim\.name=adafactor .* float32"):
        check(config)
