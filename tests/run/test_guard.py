"""Bad steps: what the limits are, and what is left of a step beyond them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from rehearsal import configured, rehearse
from small import small

from jaxmoe.config import Config, FaultConfig, GuardConfig, replace
from jaxmoe.data.cache import prepare
from jaxmoe.run.guard import LEAST, BadStep, Guard
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.state import TrainState, init_state
from jaxmoe.run.step import abstract_batch

SKIP, ROLLBACK = GuardConfig(bad_step="skip"), GuardConfig(bad_step="rollback")
NAN = FaultConfig(kind="nan-gradient", step=16)


def guard_after(values: list[tuple[float, float]], mesh: Mesh, config: GuardConfig = SKIP) -> Guard:
    guard = Guard(config, mesh)
    for step, (loss, norm) in enumerate(values, 1):
        assert guard.read(step, loss, norm, bad=False) is None
    return guard


def test_limits_are_sigmas_above_the_mean_of_logs(mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal((1.0, 0.0), (0.1, 0.5), (100, 2))
    guard = guard_after([(a, b) for a, b in np.exp(logs)], mesh)
    wanted = np.exp(logs[:99].mean(0) + 6 * logs[:99].std(0))
    np.testing.assert_allclose(guard.limits(101), wanted, rtol=1e-5)
    # The step before is not known yet when a step begins; the one after it knows it.
    np.testing.assert_allclose(guard.limits(102), np.exp(logs.mean(0) + 6 * logs.std(0)), rtol=1e-5)


def test_there_are_no_limits_before_a_few_steps_and_never_narrow_ones(mesh: Mesh) -> None:
    few = guard_after([(2.0, 1.0)] * LEAST, mesh)
    assert np.isinf(few.limits(LEAST + 1)).all()
    np.testing.assert_allclose(few.limits(LEAST + 2), np.exp([np.log(2) + 0.12, 2.1]), rtol=1e-5)


def test_patience_ends_where_too_many_are_bad_and_calm_forgets_them(mesh: Mesh) -> None:
    guard = Guard(replace(SKIP, patience=2), mesh)
    for step in (1, 2):
        assert "nan" in str(guard.read(step, math.nan, 1.0, bad=True))
    for step in range(3, 68):
        guard.read(step, 2.0, 1.0, bad=False)
    guard.read(68, math.inf, 1.0, bad=True)
    guard.read(69, math.inf, 1.0, bad=True)
    assert guard.skipped == 4
    with pytest.raises(BadStep, match=r"bad steps 68 to 70, more than guard\.patience=2"):
        guard.read(70, math.inf, 1.0, bad=True)


def a_step(config: Config, limits: tuple[float, float], mesh: Mesh) -> tuple[Any, Any, Any]:
    """The state before, after, and the step's metrics."""
    corpus = prepare(config.data, config.model.vocab_size)
    trainer = Trainer(config, mesh, corpus, Path("unused"), Silent(), math.inf, writes=False)
    told = np.array(limits, np.float32)
    trainer.guard.limits = lambda *_: jax.device_put(told)  # type: ignore[method-assign]
    state = init_state(config, mesh)
    state, _ = trainer.take(state, trainer.next_batch())
    before = jax.device_get(state)
    state, metrics = trainer.take(state, trainer.next_batch())
    return before, jax.device_get(state), jax.device_get(metrics)


def rates(state: TrainState) -> list[int]:
    is_rate = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    found = jax.tree.leaves(state.opt_state, is_leaf=is_rate)
    return [int(node.count) for node in found if is_rate(node)]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_bad_step_leaves_all_but_the_step_and_the_rate(
    optim: str, mesh: Mesh, text_cache: Path
) -> None:
    config = configured(text_cache, guard=SKIP)
    config = replace(config, optim=replace(config.optim, name=optim))
    for limits in ((math.inf, 1e-3), (1e-3, math.inf)):
        before, after, metrics = a_step(config, limits, mesh)
        # The step before the limits' first one was bad as well: all is as it was drawn.
        assert metrics.bad and int(after.step) == 2 and rates(after) == [2]
        jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
        moved = after.replace(step=before.step, opt_state=without_rates(after))
        jax.tree.map(
            np.testing.assert_array_equal, moved, before.replace(opt_state=without_rates(before))
        )
    _, after, metrics = a_step(config, (math.inf, math.inf), mesh)
    assert not metrics.bad and int(after.step) == 2


def without_rates(state: TrainState) -> Any:
    is_rate = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda n: None if is_rate(n) else n, state.opt_state, is_leaf=is_rate)


def test_a_guard_that_finds_nothing_changes_no_loss(text_cache: Path, tmp_path: Path) -> None:
    plain = rehearse(tmp_path / "plain", text_cache)
    guarded = rehearse(tmp_path / "guarded", text_cache, guard=SKIP)
    assert plain.error is guarded.error is None
    assert [row.pop("train/skipped") for row in guarded.metrics] == [0] * 24
    rows = [{k: v for k, v in row.items() if k != "train/skipped"} for row in guarded.metrics]
    assert rows == plain.metrics and guarded.evals == plain.evals


def test_limits_forget_what_was_rolled_back_and_other_kinds_of_steps(mesh: Mesh) -> None:
    guard = guard_after([(9.0 - 0.01 * n, 1.0) for n in range(200)], mesh)
    then = guard_after([(9.0 - 0.01 * n, 1.0) for n in range(100)], mesh)
    guard.rolled_back(100, 201, json.loads(json.dumps(then.state())))
    assert guard.skipped == 100
    np.testing.assert_array_equal(guard.limits(202), then.limits(102))
    assert np.isfinite(guard.limits(202)).all() and np.isinf(guard.limits(202, since=90)).all()
    guard.rolled_back(0, 202, None)
    assert np.isinf(guard.limits(203)).all()


def test_what_is_not_finite_ends_a_run_by_default(text_cache: Path, tmp_path: Path) -> None:
    ended = rehearse(tmp_path / "run", text_cache, NAN)
    assert isinstance(ended.error, FloatingPointError)
    assert ended.told("crash")[0] == 16 and ended.metrics[-1]["step"] == 15


def test_skip_leaves_one_update_out_and_goes_on(text_cache: Path, tmp_path: Path) -> None:
    ran = rehearse(tmp_path / "run", text_cache, NAN, guard=SKIP)
    assert ran.error is None
    step, why = ran.told("skip")
    assert step == 16 and "norm is nan" in why
    assert [row["step"] for row in ran.metrics] == [s for s in range(1, 25) if s != 16]
    assert ran.metrics[-1]["train/skipped"] == 1


def test_rollback_goes_on_from_the_checkpoint_behind_the_bad_batch(
    text_cache: Path, tmp_path: Path
) -> None:
    """The same on one device and on eight: all decide alike. The state after it is the
    checkpoint's, with the step and the rate of after the bad one."""
    losses = []
    for axes in ({}, {"replica": 2, "data": 2, "expert": 2}):
        folder = tmp_path / f"{len(axes)}"
        ran = rehearse(folder, text_cache, NAN, guard=ROLLBACK, axes=axes)
        assert ran.error is None
        step, why = ran.told("rollback")
        assert step == 16 and why.endswith("updates 13 to 16 are left out")
        assert [row["step"] for row in ran.events("checkpoint")] == [6, 12, 16, 18, 24]
        assert ran.metrics[-1]["train/skipped"] == 4
        losses.append([row["train/nll"] for row in ran.metrics])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_rollback_by_more_forgets_the_checkpoints_between(text_cache: Path, tmp_path: Path) -> None:
    deep = replace(ROLLBACK, rewind=5)
    ran = rehearse(tmp_path / "run", text_cache, NAN, guard=deep)
    assert ran.told("rollback")[1].endswith("updates 7 to 16 are left out")
    # None is so far back: the oldest one that was kept, and never the start again.
    far = replace(ROLLBACK, rewind=20)
    late = rehearse(tmp_path / "late", text_cache, replace(NAN, step=23), guard=far)
    assert late.told("rollback")[1].endswith("updates 13 to 23 are left out")
    first = rehearse(tmp_path / "first", text_cache, replace(NAN, step=5), guard=ROLLBACK)
    assert first.told("rollback")[1].endswith("updates 1 to 5 are left out")
    assert first.error is None and first.metrics[-1]["train/skipped"] == 5


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    text_cache: Path, tmp_path: Path
) -> None:
    """Limits are drawn from the steps of before the checkpoint, too. A loss that stands still is
    above one deviation now and then."""
    still = replace(small().optim, lr=1e-6)
    own = {"guard": replace(SKIP, sigmas=1.0), "optim": still, "train": longer()}
    whole = rehearse(tmp_path / "whole", text_cache, **own)
    kill, cut = FaultConfig(kind="hang", step=45), tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxmoe.run.faults.time.sleep", stop)
        assert rehearse(cut, text_cache, kill, **own).error is not None
    again = rehearse(cut, text_cache, kill, **own)
    assert again.error is whole.error is None
    assert again.metrics == whole.metrics and whole.metrics[-1]["train/skipped"] > 0
    steps = [row["step"] for row in whole.events("skip")]
    assert min(steps) > LEAST and {row["step"] for row in again.events("skip")} == {*steps}


def longer() -> Any:
    return replace(small().train, steps=60)


def stop(_: float) -> None:
    raise KeyError("cut off")


def test_the_batch_of_a_plan_has_limits_where_the_step_has(mesh: Mesh, text_cache: Path) -> None:
    config = configured(text_cache, NAN, guard=SKIP)
    shapes = abstract_batch(config, mesh)
    assert shapes.limits.shape == (2,) and shapes.fault.shape == (3,)
    plain = abstract_batch(configured(text_cache), mesh)
    assert plain.limits is None and plain.fault is None
    assert {f.name for f in dataclasses.fields(plain)} >= {"limits", "fault"}
