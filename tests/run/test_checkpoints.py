"""A checkpoint comes back as it was saved, or not at all; then the one before it is taken."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import Killed, events, finish, metrics, run, train

from jaxmoe.config import CheckpointConfig
from jaxmoe.errors import UserError
from jaxmoe.run.checkpoint import Checkpoints
from jaxmoe.run.state import TrainState

DAMAGES = ("delete", "empty", "cut", "flip")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with whole checkpoints of the steps 3 and 6."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), abstract())
    for step in (3, 6):
        checkpoints.save(step, state_at(step), {"step": step, "position": 8 * step})
    checkpoints.close()
    return run_dir


def state_at(step: int) -> TrainState:
    """Noise does not compress: a flipped bit is a wrong number, and no broken archive."""
    noise = np.random.default_rng(step).normal(size=(2, 4096)).astype(np.float32)
    weights = {"big": jnp.asarray(noise), "small": jnp.float32(step)}
    return TrainState(step=jnp.int32(step), params=weights, opt_state={"mu": weights})


def abstract() -> TrainState:
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
    return jax.tree.map(of, state_at(0))


def restore(run_dir: Path) -> Any:
    checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), abstract())
    try:
        return checkpoints.restore(abstract())
    finally:
        checkpoints.close()


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "flip" and data:
        data[len(data) // 2] ^= 0x10
    file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flip": bytes(data)}[how])


def contents(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    sums = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    return dict(zip((str(f.relative_to(folder)) for f in files), sums, strict=True))


def assert_equal(restored: Any, step: int) -> None:
    assert restored.step == step
    assert restored.meta == {"step": step, "position": 8 * step}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(step))


def test_the_newest_comes_back_bit_for_bit(saved: Path):
    assert_equal(restore(saved), 6)


@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_of_any_file_gives_wrong_values(saved: Path, tmp_path: Path, how: str):
    """Whole, or the one before: for every file of the newest checkpoint."""
    newest = saved / "checkpoints" / "6"
    names = [f.relative_to(newest) for f in newest.rglob("*") if f.is_file()]
    assert len(names) > 10
    caught = set()
    for name in names:
        run_dir = tmp_path / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(saved, run_dir)
        damage(run_dir / "checkpoints" / "6" / name, how)
        restored = restore(run_dir)
        if restored.broken:
            caught.add(str(name))
            assert_equal(restored, 3)
            assert restored.broken[0][0] == 6
            assert (run_dir / "broken-checkpoint-6").is_dir()
        else:
            assert_equal(restored, 6)
    own_marks = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # times and marks: nothing to lose
    assert {str(n) for n in names if n.name not in own_marks} == caught


def test_a_step_can_be_saved_again_after_it_was_set_aside(saved: Path, tmp_path: Path):
    """Twice: the first broken one is kept beside the second."""
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    for name in ("broken-checkpoint-6", "broken-checkpoint-6-2"):
        damage(run_dir / "checkpoints" / "6" / "sha256.json", "delete")
        checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), abstract())
        restored = checkpoints.restore(abstract())
        assert restored is not None
        assert restored.step == 3
        checkpoints.save(6, state_at(6), {"step": 6, "position": 48})
        checkpoints.close()
        assert (run_dir / name).is_dir()
    assert_equal(restore(run_dir), 6)


def test_when_all_are_broken_nothing_is_touched(saved: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    for step in ("3", "6"):
        damage(run_dir / "checkpoints" / step / "meta" / "metadata", "empty")
    before = contents(run_dir)
    with pytest.raises(UserError, match=r"can be restored \(6: .*; 3: .*\); bring one back"):
        restore(run_dir)
    assert contents(run_dir) == before


def test_a_run_falls_back_says_so_and_ends_the_same(
    killed: Killed, straight: Path, text_cache: Path, tmp_path: Path
):
    """One flipped bit in the largest data file of checkpoint 12: it goes on from 6."""
    run_dir = tmp_path / "run"
    shutil.copytree(killed.half, run_dir)
    arrays = (f for f in (run_dir / "checkpoints/12/state").rglob("*") if f.is_file())
    damage(max(arrays, key=lambda f: f.stat().st_size), "flip")
    shown = finish(train(run_dir), text_cache)
    assert "fallback: checkpoint 12 cannot be restored: state/" in shown
    assert [row["step"] for row in events(run_dir, "fallback")] == [12]
    assert events(run_dir, "resume")[-1]["step"] == 6
    assert metrics(run_dir) == metrics(straight)
    assert (run_dir / "evals.jsonl").read_bytes() == (straight / "evals.jsonl").read_bytes()


def test_a_run_with_broken_checkpoints_alone_is_left_as_it_is(
    killed: Killed, text_cache: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(killed.half, run_dir)
    for step in ("6", "12"):
        damage(run_dir / "checkpoints" / step / "state" / "manifest.ocdbt", "cut")
    for unfinished in run_dir.glob("checkpoints/*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished)  # what the kill cut off: orbax sweeps it up, and may
    before = contents(run_dir)
    done = run(train(run_dir), text_cache)
    assert done.returncode == 2
    assert done.stderr.startswith("jaxmoe.train: no checkpoint in ")
    assert done.stderr.count("\n") == 1
    assert contents(run_dir) == before


def test_the_saved_position_is_that_of_the_next_batch(killed: Killed):
    """Saved before the next batch is drawn."""
    for step in (6, 12):
        meta = json.loads((killed.half / f"checkpoints/{step}/meta/metadata").read_text())
        assert (meta["step"], meta["position"]) == (step, 8 * step)
