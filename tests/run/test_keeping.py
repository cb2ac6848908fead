"""Which checkpoints of a run are kept."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import lines
from rehearsal import configured, rehearse

from jaxmoe.config import CheckpointConfig, FaultConfig, fingerprint, replace
from jaxmoe.run.batches import milestones


def kept(folder: Path, text_cache: Path, **own: Any) -> list[int]:
    config = CheckpointConfig(every=2, keep=1, **own)
    ran = rehearse(folder, text_cache, checkpoint=config)
    assert ran.error is None
    return sorted(int(name) for name in os.listdir(folder / "checkpoints"))


def test_the_first_after_every_so_many_tokens_is_kept(text_cache: Path, tmp_path: Path) -> None:
    """A step has 192 tokens, and a checkpoint comes every two."""
    assert kept(tmp_path / "run", text_cache, keep_tokens=1000) == [6, 12, 16, 22, 24]
    assert kept(tmp_path / "none", text_cache) == [24]


def test_the_best_by_held_out_loss_are_kept(text_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = kept(folder, text_cache, keep_best=3)
    losses = {row["step"]: row["nll"] for row in lines(folder / "evals.jsonl") if row["step"] > 0}
    assert found == sorted([*sorted(losses, key=lambda step: losses[step])[:3]])


def test_milestones_follow_the_ramp(text_cache: Path) -> None:
    config = configured(text_cache, checkpoint=CheckpointConfig(every=5, keep_tokens=1500))
    plain = milestones(config)
    assert plain == [10, 20]  # 1,920 and 3,840 tokens; 2,880 and 4,608 are no first ones
    assert milestones(replace(config, checkpoint=CheckpointConfig(every=5))) == []
    # Of another plan's checkpoints, the first beyond each boundary stay.
    assert milestones(config, [4, 8, 12, 16]) == [8, 10, 16, 20]


@pytest.mark.parametrize("field", ["keep_tokens", "keep_best"])
def test_what_is_kept_is_in_the_fingerprint_once_it_is_said(field: str, text_cache: Path) -> None:
    config = configured(text_cache)
    changed = replace(config, checkpoint=replace(config.checkpoint, **{field: 1}))
    assert fingerprint(config) != fingerprint(changed)


def near(tmp_path: Path) -> CheckpointConfig:
    return CheckpointConfig(every=12, near=str(tmp_path / "near"), near_every=4)


STOP = FaultConfig(kind="nan-gradient", step=18)


def test_a_near_checkpoint_is_newer_and_the_run_goes_on_from_it(
    text_cache: Path, tmp_path: Path
) -> None:
    plain = rehearse(tmp_path / "plain", text_cache, checkpoint=CheckpointConfig(every=12))
    run = tmp_path / "run"
    cut = rehearse(run, text_cache, STOP, checkpoint=near(tmp_path))
    assert cut.error is not None and os.listdir(run / "checkpoints") == ["12"]
    again = rehearse(run, text_cache, STOP, checkpoint=near(tmp_path))
    assert again.error is None and again.told("resume")[0] == 16
    assert again.metrics == plain.metrics and again.evals == plain.evals
    (own,) = (tmp_path / "near").iterdir()
    assert [f.name for f in own.iterdir()] == ["20"]  # the newest alone


@pytest.mark.parametrize("lost", ["all of it", "some bytes"])
def test_without_the_near_one_the_durable_one_is_taken(
    lost: str, text_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rehearse(run, text_cache, STOP, checkpoint=near(tmp_path))
    (own,) = (tmp_path / "near").iterdir()
    if lost == "all of it":
        shutil.rmtree(own)
    else:
        file = max((f for f in own.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-7])
    again = rehearse(run, text_cache, STOP, checkpoint=near(tmp_path))
    assert again.error is None and again.told("resume")[0] == 12
    assert [row["step"] for row in again.events("fallback")] == [16] * (lost == "some bytes")


def test_another_run_does_not_take_the_near_one(text_cache: Path, tmp_path: Path) -> None:
    rehearse(tmp_path / "run", text_cache, STOP, checkpoint=near(tmp_path))
    other = rehearse(tmp_path / "other", text_cache, checkpoint=near(tmp_path))
    assert other.error is None and not other.events("resume")
