"""A copy of the run elsewhere, and going on from it."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mirrored import (
    BREAK,
    brought,
    copied,
    files,
    largest,
    same_run,
    to,
    whole,
    wrap,
)
from processes import finish, kill_group, lines, local, metrics, started, train, wait_until
from rehearsal import Rehearsed, rehearse

from jaxmoe.config import GuardConfig, OptimConfig
from jaxmoe.errors import UserError
from jaxmoe.run import copies


def test_a_run_whose_directory_is_lost_goes_on(
    lost: Path, text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    again = rehearse(lost, text_cache, checkpoint=to(tmp_path))
    assert again.told("resume")[0] == again.told("fetched")[0] == 18
    assert [event["step"] for event in again.events("start")] == [0]  # that of the lost directory
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24] and not again.events("mirror-failed")
    # What was done after the last checkpoint is there as well.
    shutil.rmtree(lost)
    brought(lost, text_cache, tmp_path)
    assert lines(lost / "events.jsonl")[-2]["what"] == "done"
    assert not {"fetching", "mirroring"} & {f.name for f in lost.iterdir()}


def test_a_copy_that_was_cut_is_none(
    lost: Path, text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None, monkeypatch: Any
) -> None:
    """Wherever the store breaks: what makes a copy whole is written last."""
    (tmp_path / "mirror" / "whole" / "18.json").unlink()
    shutil.rmtree(files(tmp_path, 18).parent)
    folder, writes = tmp_path / "begun", itertools.count()

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and key.startswith("checkpoints/18/") and next(writes) >= 5:
            raise OSError("it is gone")

    with monkeypatch.context() as patch:
        wrap(patch, tell)
        rehearse(folder, text_cache, BREAK, checkpoint=to(tmp_path))
    assert any(files(tmp_path, 18).rglob("*")) and whole(tmp_path) == [12]
    again = rehearse(lost, text_cache, checkpoint=to(tmp_path))
    assert again.told("resume")[0] == 12 and not again.events("fallback")
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24]


@pytest.mark.parametrize("damage", ["flip", "delete", "index"])
def test_a_broken_copy_is_told_and_the_one_before_taken(
    damage: str, lost: Path, text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    index = tmp_path / "mirror" / "whole" / "18.json"
    file = index if damage == "index" else largest(files(tmp_path, 18))
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(flipped if damage == "flip" else b'{"step": 18}')
    again = rehearse(lost, text_cache, checkpoint=to(tmp_path))
    step, why = again.told("fallback")
    said = {"flip": "has changed: its SHA-256 is", "delete": "is missing", "index": "is damaged"}
    assert step == 18 and "copy of checkpoint 18 is broken" in why and said[damage] in why
    assert again.told("resume")[0] == 12
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24]  # the broken one was copied again
    assert not list((tmp_path / "mirror" / "broken").glob("*.json"))


def test_without_a_whole_copy_nothing_is_begun(
    lost: Path, text_cache: Path, tmp_path: Path
) -> None:
    for step in (12, 18):
        largest(files(tmp_path, step)).write_bytes(b"")
    with pytest.raises(UserError, match="no copy in .* is whole .18: .*; 12: .*has changed"):
        brought(lost, text_cache, tmp_path)
    assert whole(tmp_path) == [12, 18] and not (lost / "config.json").exists()


def test_a_store_that_always_fails_is_told_and_training_goes_on(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None, monkeypatch: Any
) -> None:
    tries: dict[str, int] = {}

    def tell(what: str, key: str, value: Any) -> None:
        tries[key] = tries.get(key, 0) + 1
        if what == "write" and ("/6/" in key or "/12/" in key):
            raise OSError("no such bucket")

    wrap(monkeypatch, tell)
    ran = rehearse(tmp_path / "run", text_cache, checkpoint=to(tmp_path))
    same_run(ran, plain)
    failed = ran.events("mirror-failed")
    assert [event["step"] for event in failed] == [6, 12]
    assert failed[0]["why"].startswith("checkpoint 6 is not copied: checkpoints/6/")
    assert failed[0]["why"].endswith(": no such bucket")
    assert whole(tmp_path) == [18, 24]  # those after it
    assert tries[failed[0]["why"].split(": ")[1]] == 1 + copies.TRIES  # once ahead


def test_what_is_kept_there_is_what_is_kept_here(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    own = to(tmp_path, every=2, keep=1, at=(5,), keep_tokens=1000, keep_best=2)
    ran = rehearse(tmp_path / "run", text_cache, checkpoint=own)
    here = sorted(int(f.name) for f in (ran.folder / "checkpoints").iterdir())
    assert {5, 6, 12, 16, 22, 24} <= {*here}  # by steps and by tokens
    assert whole(tmp_path) == here
    left = [f for f in (tmp_path / "mirror" / "checkpoints").rglob("*") if f.is_file()]
    assert {int(f.parts[len(tmp_path.parts) + 2]) for f in left} == {*here}


def test_what_is_rolled_back_counts_no_more(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    guard = GuardConfig(bad_step="rollback", rewind=8)
    own = {"checkpoint": to(tmp_path, keep=4), "guard": guard}
    ran = rehearse(tmp_path / "run", text_cache, BREAK, **own)
    assert ran.error is None and "updates 7 to 20 are left out" in ran.told("rollback")[1]
    assert [event["step"] for event in ran.events("mirrored")] == [6, 12, 18, 20, 24]
    assert whole(tmp_path) == [6, 20, 24]


def test_a_place_of_another_run_is_refused(
    lost: Path, there: Path, text_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds copies of another run than"):
        brought(there, text_cache, tmp_path)
    ((what, _, why),) = copied(there, text_cache, tmp_path)  # of a start that could not ask
    assert what == "mirror-failed" and "holds copies of another run" in why
    new = tmp_path / "new"
    with pytest.raises(UserError, match="a run of a different config .*warmup_steps.*4"):
        brought(new, text_cache, tmp_path, optim=OptimConfig(warmup_steps=4))
    with pytest.raises(UserError, match="--resume never: .* holds a run already"):
        brought(new, text_cache, tmp_path, "never")
    brought(new, text_cache, tmp_path, "must")
    assert (new / "checkpoints" / "18").exists()
    brought(new, text_cache, tmp_path)  # its own
    with pytest.raises(UserError, match="--resume must: .* holds no run, and .* no copy of one"):
        brought(tmp_path / "newer", text_cache, tmp_path / "elsewhere", "must")
    assert not (tmp_path / "newer").exists()


def test_a_mirror_that_cannot_be_asked(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    """With checkpoints here the run goes on; without them it might begin anew what is there."""

    def tell(what: str, key: str, value: Any) -> None:
        raise OSError("no route to host")

    wrap(monkeypatch, tell)
    brought(there, text_cache, tmp_path)
    (event,) = [e for e in lines(there / "events.jsonl") if e["what"] == "mirror-failed"]
    assert event["step"] == 24 and "cannot be asked for a newer checkpoint" in event["why"]
    with pytest.raises(UserError, match="no route to host; nothing is in .*new to go on from"):
        brought(tmp_path / "new", text_cache, tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_register_of_before_the_start_is_not_lost(
    lost: Path, text_cache: Path, tmp_path: Path
) -> None:
    index = json.loads((tmp_path / "mirror" / "whole" / "18.json").read_text())
    register_there = tmp_path / "mirror" / index["record"]["folder"] / "forecasts.jsonl"
    first = register_there.read_text().splitlines()[0]
    lost.mkdir()
    (lost / "forecasts.jsonl").write_text(first.replace("12", "13") + "\n")
    with pytest.raises(UserError, match="is not the register that .* has: line 1"):
        brought(lost, text_cache, tmp_path)
    assert not (lost / "config.json").exists()
    (lost / "forecasts.jsonl").write_text(first + "\n")
    brought(lost, text_cache, tmp_path)
    assert (lost / "forecasts.jsonl").read_text() == register_there.read_text()


@pytest.mark.parametrize("at", ["config", "record", "sign", "moved"])
def test_a_kill_while_it_is_brought(
    at: str, lost: Path, text_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever was there then, the next start has all of it."""
    brought(lost, text_cache, tmp_path)
    wanted = {f.name: f.read_text() for f in lost.iterdir() if f.suffix in (".json", ".jsonl")}
    shutil.rmtree(lost)
    counts = {"config": 1, "record": 4, "sign": 10**6, "moved": 10**6}

    def stop(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def stopping(*args: Any) -> Any:
            if next(calls) >= count:
                raise KeyboardInterrupt
            return call(*args)

        return stopping

    rename = os.rename

    def moves(*args: Any) -> None:
        if at == "moved":
            rename(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop(counts[at], os.replace))
        patch.setattr(os, "rename", moves)
        brought(lost, text_cache, tmp_path)
    assert (lost / "checkpoints" / "18").exists() == (at == "moved")
    brought(lost, text_cache, tmp_path)
    assert (lost / "checkpoints" / "18").exists()
    drawn = {"events.jsonl"}  # one more `fetched`
    assert {f.name for f in lost.iterdir() if f.suffix in (".json", ".jsonl")} == {*wanted}
    for name in {*wanted} - drawn:
        assert (lost / name).read_text() == wanted[name], name


def test_a_newer_copy_comes_to_a_directory_that_keeps_its_record(
    broken_off: Path, lost: Path, text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    shutil.copytree(broken_off / "run", lost)
    shutil.rmtree(lost / "checkpoints")
    again = rehearse(lost, text_cache, checkpoint=to(tmp_path))
    assert again.told("fetched")[0] == 18 and again.events("crash")
    same_run(again, plain)


def test_a_killed_run_goes_on_in_an_empty_directory(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = train(run_dir, "--set", f"checkpoint.mirror={(tmp_path / 'mirror').as_uri()}")
    with started([*command, "--set", "faults=[{'kind':'slow','step':13}]"], text_cache, log) as one:
        wait_until(one, lambda: (tmp_path / "mirror" / "whole" / "12.json").exists(), log)
        kill_group(one)
    shutil.rmtree(run_dir)
    said = finish(command, text_cache)
    assert "mirror: fetched: checkpoint" in said
    assert metrics(run_dir) == metrics(straight)
    shutil.rmtree(run_dir)
    assert "is finished" in finish([*command, "--resume", "must"], text_cache)
    assert (run_dir / "report.html").exists()


@pytest.mark.multiprocess
def test_two_processes_wait_for_the_first(text_cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = local(2, run_dir, "--set", f"checkpoint.mirror={(tmp_path / 'mirror').as_uri()}")
    finish(command, text_cache)
    before = metrics(run_dir)
    assert whole(tmp_path)[-1] == 24
    shutil.rmtree(run_dir)
    said = finish(command, text_cache)
    assert said.count("is finished") == 1 and metrics(run_dir) == before
