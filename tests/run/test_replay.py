"""A step again: what agrees, what does not, and where."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import lines, run

from jaxmoe import replay as replay_lib
from jaxmoe import tree
from jaxmoe.errors import UserError
from jaxmoe.replay import left_out, main, replay
from jaxmoe.run import platform
from jaxmoe.run.loop import Trainer

LEAF = "params/layers/"


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.multiprocess
def test_a_step_of_a_sound_run_is_repeated_bit_for_bit_and_nothing_is_written(
    straight: Path, text_cache: Path
) -> None:
    before = contents(straight)
    command = [sys.executable, "-m", "jaxmoe.replay", str(straight), "--step", "22", "--json"]
    done = run(command, text_cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["began"], found["same_mesh"]) == ("deterministic", 18, True)
    (row,) = [r for r in lines(straight / "metrics.jsonl") if r["step"] == 22]
    wanted = [row["train/nll"], row["train/grad_norm"]]
    assert found["recorded"] == wanted and found["replayed"] == wanted
    assert found["twice"] == [] and found["elsewhere"] is None
    assert contents(straight) == before


def test_updates_that_the_guard_left_out_are_left_out_again(tmp_path: Path) -> None:
    """What a resume undid is not; and what was rolled back to is not guessed."""
    rows = [(8, "skip"), (12, "skip"), (9, "resume"), (15, "skip"), (20, "rollback")]
    events = [{"step": step, "what": what, "why": ""} for step, what in rows]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert left_out(tmp_path, 6, 18) == {8, 15}
    assert left_out(tmp_path, 20, 24) == {8, 15}
    with pytest.raises(UserError, match="rolled back at step 20"):
        left_out(tmp_path, 18, 24)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, text_cache: Path) -> None:
    """Replays in this process, on its eight devices."""
    monkeypatch.setattr(platform, "start", lambda _: None)
    monkeypatch.setenv("JAXMOE_CACHE", str(text_cache))


def flipped(which: str) -> Callable[[str, Any], Any]:
    """One bit of one element, in one of the replays; the fifth array of the layers."""

    def bend(replayed: str, state: Any) -> Any:
        names = [name for name, _ in tree.named_leaves(state) if name.startswith(LEAF)]

        def one(name: str, array: jax.Array) -> jax.Array:
            if replayed != which or name != names[4]:
                return array
            values = np.array(array)
            values.view(np.uint32).reshape(-1)[7] ^= 1 << 3
            return jax.device_put(values, array.sharding)

        return tree.map_named(one, state)

    return bend


def test_on_eight_devices_the_step_is_that_of_one(here: None, straight: Path) -> None:
    """To rounding: the run was on one device."""
    found = replay(straight, 20)
    assert (found.verdict, found.same_mesh, found.first_unlike) == ("deterministic", False, None)
    assert found.elsewhere == []
    assert found.recorded == pytest.approx(found.replayed, rel=1e-5)


@pytest.mark.parametrize(
    ("which", "verdict"), [("again", "non-deterministic"), ("elsewhere", "device-bound")]
)
def test_a_flipped_bit_is_named(
    which: str, verdict: str, here: None, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = replay(straight, 19, flipped(which))
    assert found.verdict == verdict
    parts = found.twice if which == "again" else found.elsewhere
    assert parts and len({one.name for one in parts}) == 1
    assert all(one.name.startswith(LEAF) and one.elements == 1 for one in parts)
    first, other = parts[0].devices
    assert "cpu" in first.lower() and (first == other) == (which == "again")
    replay_lib._show(found)
    said = capsys.readouterr().out
    assert parts[0].name in said and f"{verdict}: " in said


def test_a_record_that_is_not_repeated_is_told_from_the_step_where_it_begins(
    here: None, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a fault of the machine in step 20, of which nothing is left but the record."""
    copy = tmp_path / "run"
    shutil.copytree(straight, copy)
    rows = lines(copy / "metrics.jsonl")
    for row in rows[19:]:
        row["train/nll"] *= 1.01
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(copy), "--step", "22"]) == 1
    said = capsys.readouterr().out
    assert "the record differs first at step 20" in said and "not repeated: " in said


def test_a_step_that_was_not_recorded_is_not_said_to_be_repeated(
    here: None, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(straight, copy)
    rows = lines(copy / "metrics.jsonl")[:18]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(copy), "--step", "20"]) == 0
    assert "unrecorded: " in capsys.readouterr().out
    crash = {"step": 20, "what": "crash", "why": "the train loss is nan"}
    with open(copy / "events.jsonl", "a") as events:
        events.write(json.dumps(crash) + "\n")
    assert main([str(copy), "--step", "20"]) == 1
    said = capsys.readouterr().out
    assert "the run ended here" in said and "the record differs first at step 20" in said


def test_events_of_the_trainer_are_not_written(
    here: None, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the one that tells of a shape of a ramp that is compiled."""
    before = contents(straight)
    take = Trainer.take

    def telling(self: Trainer, *args: Any) -> Any:
        self._event("shape", 1, "compiled")
        return take(self, *args)

    monkeypatch.setattr(Trainer, "take", telling)
    assert replay(straight, 19).verdict == "deterministic"
    assert contents(straight) == before


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("0", "the run has steps 1 to 24"),
        ("25", "the run has steps 1 to 24"),
        ("5", "no whole checkpoint at or before it"),
    ],
)
def test_mistakes_are_one_line(
    step: str, said: str, here: None, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(straight), "--step", step]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_no_run_is_a_mistake(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--step", "3"]) == 2
    assert "config.json" in capsys.readouterr().err
