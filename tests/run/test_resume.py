"""A run that was killed goes on as if nothing had happened; on another mesh, to rounding."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import SMALL, Killed, events, finish, lines, metrics, train
from rehearsal import configured, rehearse

from jaxmoe.config import RouterConfig, load, replace
from jaxmoe.errors import UserError
from jaxmoe.forecast.__main__ import main as forecast
from jaxmoe.run.record import check_directory, forbidden


def test_every_loss_equals_the_unbroken_runs_bit_for_bit(killed: Killed, straight: Path):
    """Loss, gradient norm, rate and expert load of every step, once and in order."""
    assert metrics(killed.run_dir) == metrics(straight)
    assert [row["step"] for row in metrics(straight)] == list(range(1, 25))


def test_the_kills_came_where_they_should(killed: Killed):
    """Before a checkpoint, between two, and in the middle of writing one."""
    resumed = [row["step"] for row in events(killed.run_dir, "resume")]
    assert len(events(killed.run_dir, "start")) == 2
    assert resumed[0] == 12
    assert killed.half_step > 12
    assert resumed[-1] in (12, 18)


def test_evals_equal_the_unbroken_runs_and_none_is_there_twice(killed: Killed, straight: Path):
    assert (killed.run_dir / "evals.jsonl").read_bytes() == (straight / "evals.jsonl").read_bytes()


def test_the_register_goes_on_where_it_was(killed: Killed, straight: Path):
    """One forecast a cut-off, the same numbers as without kills, and the chain holds."""
    mine, theirs = (lines(run / "forecasts.jsonl") for run in (killed.run_dir, straight))
    assert [row.get("cutoff_step") for row in mine] == [12, 16, 20, None]
    assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]
    assert forecast(["verify", str(killed.run_dir)]) == 0


def test_the_data_position_is_the_sequences_consumed(killed: Killed):
    saved = json.loads((killed.run_dir / "checkpoints/24/meta/metadata").read_text())
    assert saved["position"] == 24 * 8


def test_the_time_of_earlier_starts_counts(killed: Killed):
    seconds = [row["seconds"] for row in lines(killed.run_dir / "metrics.jsonl")]
    assert seconds == sorted(seconds)


@pytest.fixture(scope="module")
def moved(killed: Killed, text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun on one device, finished on eight: stage=2 x expert=2 x model=2."""
    run_dir = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(killed.half, run_dir)
    mesh = [f"mesh.{axis}=2" for axis in ("stage", "expert", "model")]
    finish(train(run_dir, *(word for one in mesh for word in ("--set", one))), text_cache)
    return run_dir


def test_on_another_mesh_every_loss_is_the_same_to_rounding(moved: Path, straight: Path):
    """So the order of the data is the same, and so is every part of the state."""
    assert [row["step"] for row in events(moved, "resume")][-1] == 12
    assert json.loads((moved / "environment.json").read_text())["mesh"]["stage"] == 2
    mine, theirs = metrics(moved), metrics(straight)
    assert mine[:12] == theirs[:12]
    for name in ("step", "tokens", "train/nll", "train/loss", "train/lr"):
        np.testing.assert_allclose(
            [row[name] for row in mine], [row[name] for row in theirs], rtol=1e-5, err_msg=name
        )


def test_in_other_parts_every_loss_is_the_same_to_rounding(text_cache: Path, tmp_path: Path):
    """Begun on one device with the whole batch; gone on with half of it on each of two, in two
    parts, by other paths; not where parts would not add up to the batch."""
    router = RouterConfig(load_balance_scope="sequence")
    model = replace(load(str(SMALL)).model, router=router)
    steps = replace(load(str(SMALL)).train, steps=12)
    plain = rehearse(tmp_path / "plain", text_cache, model=model, train=steps)
    assert plain.error is None
    shutil.copytree(plain.folder, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "12")
    other = replace(model, remat="none", expert_path="blocked", loss_chunk=4)
    parts = {"model": other, "train": replace(steps, accumulate=2)}
    check_directory(tmp_path / "moved", configured(text_cache, axes={"data": 2}, **parts), "must")
    moved = rehearse(tmp_path / "moved", text_cache, axes={"data": 2}, **parts)
    assert moved.error is None and [row["step"] for row in moved.events("resume")] == [6]
    assert moved.metrics[:6] == plain.metrics[:6] and moved.metrics[6:] != plain.metrics[6:]
    for name in ("step", "tokens", "train/nll", "train/loss", "train/grad_norm"):
        mine, theirs = ([row[name] for row in run.metrics] for run in (moved, plain))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, err_msg=name)
    balanced = replace(other, router=RouterConfig())
    for wrong in ({**parts, "model": balanced}, {**parts, "train": replace(steps, batch_size=4)}):
        with pytest.raises(UserError, match=r"different config \((model\.router\.|train\.batch)"):
            check_directory(tmp_path / "moved", configured(text_cache, **wrong), "must")
    whole, cut = ({"model": balanced, "train": replace(steps, accumulate=n)} for n in (1, 2))
    told = forbidden(configured(text_cache, **whole), configured(text_cache, **cut))
    assert told == ["train.accumulate: 1 -> 2"]


def test_on_another_mesh_evals_agree_and_the_register_holds(moved: Path, straight: Path):
    """The later line of a step is the one that counts."""
    theirs = {row["step"]: row["nll"] for row in lines(straight / "evals.jsonl")}
    mine = {row["step"]: row["nll"] for row in lines(moved / "evals.jsonl")}
    assert list(theirs) == sorted(mine)
    np.testing.assert_allclose([mine[s] for s in theirs], list(theirs.values()), rtol=1e-5)
    assert forecast(["verify", str(moved)]) == 0
    cutoffs = [row.get("cutoff_step") for row in lines(moved / "forecasts.jsonl")]
    assert cutoffs == [12, 16, 20, None]
