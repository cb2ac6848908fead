"""Saves that cannot be written: told, survived, alike on all processes."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from processes import events, local, metrics, run
from rehearsal import rehearse

from jaxmoe.config import CheckpointConfig
from jaxmoe.run import writing
from jaxmoe.run.ballot import Ballot, Outvoted
from jaxmoe.run.checkpoint import Checkpoints
from jaxmoe.run.state import TrainState


@pytest.mark.multiprocess
def test_what_one_of_two_cannot_write_fails_on_both_at_once(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    """The one that is not asked to write more, and the one that names checkpoints. Without the
    ballot the other one waits for orbax's 20 minutes."""
    run_dir = tmp_path / "run"
    full = [{"kind": "disk-full", "step": step, "rank": rank} for step, rank in ((6, 1), (18, 0))]
    done = run(local(2, run_dir, "--set", f"faults={json.dumps(full)}"), text_cache)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(row["step"], row["why"]) for row in events(run_dir, "save-failed")]
    assert [step for step, _ in told] == [12, 24]
    assert told[0][1].startswith("checkpoint 6 could not be saved: process 1: OSError: [Errno 28]")
    assert told[1][1].startswith("checkpoint 18 could not be saved: OSError: [Errno 28]")
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["12", "24"]
    assert len(metrics(run_dir)) == len(metrics(straight))


class Space(NamedTuple):
    f_blocks: int
    f_bavail: int
    f_frsize: int = 4096


def test_a_save_without_room_is_not_begun(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fill the disk for nothing; an unknown size of the disk is no reason."""
    monkeypatch.setattr(writing.os, "statvfs", lambda _: Space(f_blocks=1000, f_bavail=2))
    ran = rehearse(tmp_path / "run", text_cache)
    assert "checkpoint 24 could not be saved: 0.0 GB are free" in str(ran.error)
    assert [row["step"] for row in ran.events("save-failed")] == [6, 12, 18, 24]
    assert not os.listdir(ran.folder / "checkpoints")
    monkeypatch.setattr(writing.os, "statvfs", lambda _: Space(f_blocks=0, f_bavail=0))
    assert writing.cannot_write(tmp_path, 10**9) is None


def test_a_folder_that_is_gone_is_told(text_cache: Path, tmp_path: Path) -> None:
    why = writing.cannot_write(tmp_path / "none", 1)
    assert why is not None and why.startswith("FileNotFoundError: ")


def test_an_array_larger_than_what_is_written_at_a_time_is_saved(tmp_path: Path) -> None:
    """The bound on memory grows with the largest part of an array, which is written at once."""
    large = {"a": jnp.zeros(10_000_000, jnp.float32)}  # 40 MB, on one device
    state = TrainState(step=jnp.int32(1), params=large, opt_state={})
    assert large["a"].nbytes > writing.LEAST
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), state)
    assert checkpoints.save(1, state, {"step": 1}) is None
    assert checkpoints.close() is None and checkpoints.steps() == [1]


class Store:
    """The coordination service's part that a ballot uses; alone in it."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert value and key not in self.rows, key
        self.rows[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [row for row in self.rows.items() if row[0].startswith(key)]

    def key_value_delete(self, key: str) -> None:
        self.rows = {k: v for k, v in self.rows.items() if not k.startswith(key)}

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self.rows[key]


def ballots(monkeypatch: pytest.MonkeyPatch, n: int) -> tuple[Store, list[Ballot]]:
    """One for each of `n` processes, which share a store."""
    store, made = Store(), []
    monkeypatch.setattr("jaxmoe.run.ballot.coordination_client", lambda: store)
    monkeypatch.setattr("jaxmoe.run.ballot.jax.process_count", lambda: n)
    for rank in range(n):
        monkeypatch.setattr("jaxmoe.run.ballot.jax.process_index", lambda rank=rank: rank)
        made.append(Ballot())
        made[-1]._name = "ballot"
    return store, made


def test_a_silent_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (first, _, third) = ballots(monkeypatch, 3)
    for one in (first, third):
        one.begin()
    third.fail("not in this phase")
    with pytest.raises(Outvoted, match="process 1 did not answer within 0.1 s"):
        first.ready(None, 0.1)


def test_old_votes_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of weeks saves some ten thousand times."""
    store, both = ballots(monkeypatch, 2)
    sizes = []
    for _ in range(6):
        for one in reversed(both):  # process 0 counts
            one.begin()
            one.fail("no room") if one is both[1] else None
        with pytest.raises(Outvoted, match="process 1: no room"):
            both[0].barrier(key="async_write_complete", timeout_ms=1000)
        sizes.append(len(store.rows))
    assert sizes[2:] == [sizes[2]] * 4
