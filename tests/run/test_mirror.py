"""A copy of the run elsewhere, and going on from it."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import finish, kill_group, lines, local, metrics, started, train, wait_until
from rehearsal import Rehearsed, configured, rehearse

from jaxmoe import stores
from jaxmoe.config import CheckpointConfig, FaultConfig, GuardConfig, OptimConfig, replace
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.run import copies, mirror, seal
from jaxmoe.run.bring import bring
from jaxmoe.run.loop import Trainer

BREAK = FaultConfig(kind="nan-gradient", step=20)  # ends the run without a save


def to(tmp_path: Path, **own: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"every": 6, "mirror": (tmp_path / "mirror").as_uri(), **own})


def whole(tmp_path: Path) -> list[int]:
    return sorted(int(f.stem) for f in (tmp_path / "mirror" / "whole").glob("*.json"))


def files(tmp_path: Path, step: int) -> Path:
    return tmp_path / "mirror" / "checkpoints" / str(step) / "files"


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.fixture(scope="module")
def plain(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """The run without a mirror and without a break."""
    return rehearse(tmp_path_factory.mktemp("plain") / "run", text_cache)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits at each save until its copy is there or has failed, so that what is there at a
    break is known; and tries come soon after one another."""
    save = Trainer.save

    def slowly(self: Trainer, step: int, state: Any, *, near: bool = False) -> None:
        save(self, step, state, near=near)
        self.settle_saves(step)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.config.checkpoint.mirror is not None:
            told = [e["step"] for e in self.record.read("events.jsonl") if "mirror" in e["what"]]
            if step in told:
                return
            time.sleep(0.005)

    monkeypatch.setattr(Trainer, "save", slowly)
    monkeypatch.setattr(mirror, "TICK", 0.01)
    monkeypatch.setattr(copies, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(copies, "JITTER", 0.001)


class Wrapped:
    """A store of which each request is told beforehand, which may raise."""

    def __init__(self, store: Any, tell: Callable[[str, str, Any], None]) -> None:
        self._store, self._tell = store, tell

    def write(self, key: str, value: bytes | None) -> Any:
        self._tell("write", key, value)
        return self._store.write(key, value)

    def read(self, key: str) -> Any:
        self._tell("read", key, None)
        return self._store.read(key)

    def __getattr__(self, name: str) -> Any:
        self._tell(name, "", None)
        return getattr(self._store, name)


def wrap(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str, str, Any], None]) -> None:
    opened = stores.opened
    monkeypatch.setattr(stores, "opened", lambda *args: Wrapped(opened(*args), tell))


def same_run(one: Rehearsed, other: Rehearsed) -> None:
    """Bit for bit, and the register too but for when its lines were written."""
    assert one.error is None and one.metrics == other.metrics and one.evals == other.evals
    kept = [register.read(r.folder / "forecasts.jsonl") for r in (one, other)]
    own = ("time", "previous", "config", "code")
    assert [{k: v for k, v in line.items() if k not in own} for line in kept[0]] == [
        {k: v for k, v in line.items() if k not in own} for line in kept[1]
    ]
    assert register.verify(one.folder / "forecasts.jsonl") == []


def broken_off(text_cache: Path, tmp_path: Path, **own: Any) -> Path:
    """A run that ended at step 20 and whose directory is lost."""
    folder = tmp_path / "run"
    ran = rehearse(folder, text_cache, BREAK, checkpoint=to(tmp_path, **own))
    assert isinstance(ran.error, FloatingPointError)
    shutil.rmtree(folder)
    return folder


def test_a_run_whose_directory_is_lost_goes_on(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    folder = broken_off(text_cache, tmp_path)
    assert whole(tmp_path) == [12, 18]
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert again.told("resume")[0] == again.told("fetched")[0] == 18
    assert [event["step"] for event in again.events("start")] == [0]  # that of the lost directory
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24] and not again.events("mirror-failed")
    # What was done after the last checkpoint is there as well.
    shutil.rmtree(folder)
    config = configured(text_cache, checkpoint=to(tmp_path))
    bring(config, folder, "auto", lambda line: None)
    assert lines(folder / "events.jsonl")[-2]["what"] == "done"
    assert not {"fetching", "mirroring"} & {f.name for f in folder.iterdir()}


def test_a_store_that_breaks_in_a_copy_leaves_the_one_before(
    text_cache: Path,
    tmp_path: Path,
    plain: Rehearsed,
    in_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the file: the one that makes it whole is the last."""
    writes = itertools.count()

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and key.startswith("checkpoints/18/") and next(writes) >= 5:
            raise OSError("it is gone")

    with monkeypatch.context() as patch:
        wrap(patch, tell)
        folder = broken_off(text_cache, tmp_path)
    assert any(files(tmp_path, 18).rglob("*")) and whole(tmp_path) == [6, 12]
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert again.told("resume")[0] == 12 and not again.events("fallback")
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "index"])
def test_a_broken_copy_is_told_and_the_one_before_taken(
    damage: str, text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    folder = broken_off(text_cache, tmp_path)
    index = tmp_path / "mirror" / "whole" / "18.json"
    file = index if damage == "index" else largest(files(tmp_path, 18))
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    changed = {"flip": flipped, "cut": data[:-7], "delete": None, "index": b'{"step": 18}'}[damage]
    file.unlink() if changed is None else file.write_bytes(changed)
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    step, why = again.told("fallback")
    assert step == 18 and "copy of checkpoint 18 is broken" in why
    assert again.told("resume")[0] == 12
    same_run(again, plain)
    assert whole(tmp_path) == [18, 24]  # the broken one was copied again
    assert not list((tmp_path / "mirror" / "broken").glob("*.json"))


def test_without_a_whole_copy_nothing_is_begun(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    folder = broken_off(text_cache, tmp_path)
    for step in (12, 18):
        largest(files(tmp_path, step)).write_bytes(b"")
    with pytest.raises(UserError, match="no copy in .* is whole .18: .*; 12: .*has changed"):
        rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert whole(tmp_path) == [12, 18] and not (folder / "config.json").exists()


def test_requests_that_fail_now_and_then_are_made_again(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None, monkeypatch: Any
) -> None:
    seen: dict[tuple[str, str], int] = {}

    def tell(what: str, key: str, value: Any) -> None:
        seen[what, key] = seen.get((what, key), 0) + 1
        if key and seen[what, key] % 3:
            raise OSError("try again")

    wrap(monkeypatch, tell)
    folder = broken_off(text_cache, tmp_path)
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert again.told("resume")[0] == 18 and not again.events("mirror-failed")
    same_run(again, plain)
    assert {what for what, key in seen if key} == {"read", "write"}


def test_a_store_that_always_fails_is_told_and_training_goes_on(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None, monkeypatch: Any
) -> None:
    tries: list[str] = []

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and key.startswith("checkpoints/12/files/_CHECK"):
            tries.append(key)
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
    assert len(tries) in (0, 7)  # begun once ahead, and tried six times; or another file came first


def test_what_is_kept_there_is_what_is_kept_here(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    own = to(tmp_path, every=2, keep=1, at=(5,), keep_tokens=1000, keep_best=2)
    ran = rehearse(tmp_path / "run", text_cache, checkpoint=own)
    here = sorted(int(f.name) for f in (ran.folder / "checkpoints").iterdir())
    assert {5, 6, 12, 16, 22, 24} <= {*here}  # by steps and by tokens
    assert whole(tmp_path) == here
    assert sorted(int(f.name) for f in (tmp_path / "mirror" / "checkpoints").iterdir()) == here


def test_requests_have_a_bounded_size_and_few_are_under_way(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(copies, "PART", 3_000)
    sizes: list[int] = []
    held = [0]
    most = [0]

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "/files/" in key:
            sizes.append(len(value))

    under_way = copies.Copies._ask

    def ask(self: Any, what: str, ask: Any, begun: Any = None) -> Any:
        held[0] -= begun is not None
        return under_way(self, what, ask, begun)

    class Counted(Wrapped):
        def write(self, key: str, value: bytes | None) -> Any:
            if "/files/" in key:
                held[0] += 1
                most[0] = max(most[0], held[0])
            return super().write(key, value)

    opened = stores.opened
    monkeypatch.setattr(stores, "opened", lambda *args: Counted(opened(*args), tell))
    monkeypatch.setattr(copies.Copies, "_ask", ask)
    folder = broken_off(text_cache, tmp_path)
    assert max(sizes) == 3_000 and len(sizes) > 30
    assert most[0] == copies.FLIGHT
    index = json.loads((tmp_path / "mirror" / "whole" / "18.json").read_text())
    name, one = max(index["files"].items(), key=lambda item: item[1]["parts"])
    assert one["parts"] == -(-one["size"] // 3_000) > 3
    # By hand it is put together as this module says.
    pieces = sorted(files(tmp_path, 18).glob(f"{name}.part-*"))
    assert sum(piece.stat().st_size for piece in pieces) == one["size"]
    same_run(rehearse(folder, text_cache, checkpoint=to(tmp_path)), plain)


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_deleted_while_it_is_copied(
    links: bool, text_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With hard links its copy is whole all the same, so that a slow store is not always late."""
    folder = tmp_path / "run"
    monkeypatch.setattr(mirror, "TICK", 0.01)
    if not links:
        monkeypatch.setattr(os, "link", refuse)

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/6/files/" in key:
            until = time.monotonic() + 60
            while (folder / "checkpoints" / "6").exists() and time.monotonic() < until:
                time.sleep(0.005)

    save = Trainer.save

    def saved(self: Trainer, step: int, state: Any, *, near: bool = False) -> None:
        save(self, step, state, near=near)
        self.settle_saves(step)
        until = time.monotonic() + 60
        held = tmp_path / "mirror" / "run.json"  # the copy of 6 has begun
        while step == 6 and not held.exists() and time.monotonic() < until:
            time.sleep(0.005)

    wrap(monkeypatch, tell)
    monkeypatch.setattr(Trainer, "save", saved)
    ran = rehearse(folder, text_cache, checkpoint=to(tmp_path, keep=1))
    assert ran.error is None and not ran.events("mirror-failed")
    copied = [event["step"] for event in ran.events("mirrored")]
    assert copied[-1] == 24 and (6 in copied) == links


def refuse(*_: Any) -> None:
    raise OSError("no links here")


def test_copies_are_of_what_was_sealed(text_cache: Path, tmp_path: Path, in_step: None) -> None:
    """A checkpoint that is damaged here is not passed on as a whole one."""
    damage = FaultConfig(kind="flip-checkpoint", step=12)
    with_damage = {"checkpoint": to(tmp_path), "faults": (damage,)}
    ran = rehearse(tmp_path / "run", text_cache, **with_damage)
    told = {event["step"]: event["why"] for event in ran.events("mirror-failed")}
    copied = [event["step"] for event in ran.events("mirrored")]
    assert (12 in told) != (12 in copied)  # the fault strikes beside the copying
    if 12 in told:
        assert "is not as it was sealed" in told[12]
    broken = tmp_path / "run" / "checkpoints" / "24"
    largest(broken).write_bytes(b"other")
    assert seal.problem(broken, ("state", "meta")) is not None


def test_what_is_rolled_back_counts_no_more(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    guard = GuardConfig(bad_step="rollback", rewind=8)
    own = {"checkpoint": to(tmp_path, keep=4), "guard": guard}
    ran = rehearse(tmp_path / "run", text_cache, BREAK, **own)
    assert ran.error is None and "updates 7 to 20 are left out" in ran.told("rollback")[1]
    assert [event["step"] for event in ran.events("mirrored")] == [6, 12, 18, 20, 24]
    assert whole(tmp_path) == [6, 20, 24]


def test_a_place_of_another_run_is_refused(text_cache: Path, tmp_path: Path, in_step: None) -> None:
    own = to(tmp_path)
    folder = rehearse(tmp_path / "run", text_cache, checkpoint=own).folder
    say = lambda line: None  # noqa: E731
    config = configured(text_cache, checkpoint=own)
    other = rehearse(tmp_path / "other", text_cache, checkpoint=CheckpointConfig(every=6)).folder
    with pytest.raises(UserError, match="holds copies of another run than"):
        bring(config, other, "auto", say)
    changed = replace(config, optim=OptimConfig(peak_lr=0.5))
    with pytest.raises(UserError, match="a run of a different config .*0.5"):
        bring(changed, tmp_path / "new", "auto", say)
    with pytest.raises(UserError, match="--resume never: .* holds a run already"):
        bring(config, tmp_path / "new", "never", say)
    bring(config, tmp_path / "new", "must", say)
    assert (tmp_path / "new" / "checkpoints" / "24").exists()
    bring(config, folder, "auto", say)  # its own
    empty = replace(config, checkpoint=to(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="--resume must: .* holds no run, and .* no copy of one"):
        bring(empty, tmp_path / "newer", "must", say)


def test_of_two_starts_the_later_one_has_the_place(
    text_cache: Path, tmp_path: Path, in_step: None, monkeypatch: Any
) -> None:
    """A machine that was given up, and is not dead, ends the copying and not the training."""
    place = tmp_path / "mirror" / "run.json"

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/18/files/" in key:
            place.write_text(json.dumps({**json.loads(place.read_text()), "start": "later"}))

    wrap(monkeypatch, tell)
    monkeypatch.setattr(mirror, "LEAVE", 0.1)
    saved = Trainer.save
    before = lambda self, step, *a, **k: step <= 18 and saved(self, step, *a, **k)  # noqa: E731
    monkeypatch.setattr(Trainer, "save", before)
    ran = rehearse(tmp_path / "run", text_cache, checkpoint=to(tmp_path))
    assert ran.error is None
    step, why = ran.told("mirror-failed")
    assert step == 18 and "written to by another start of this run" in why
    assert whole(tmp_path) == [6, 12]


def test_a_mirror_that_cannot_be_asked(
    text_cache: Path, tmp_path: Path, in_step: None, monkeypatch: Any
) -> None:
    """With checkpoints here the run goes on; without them it might begin anew what is there."""
    folder = tmp_path / "run"
    rehearse(folder, text_cache, BREAK, checkpoint=to(tmp_path))
    monkeypatch.setattr(copies, "TRIES", 2)

    def tell(what: str, key: str, value: Any) -> None:
        raise OSError("no route to host")

    wrap(monkeypatch, tell)
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert again.error is None and again.told("resume")[0] == 18
    assert "cannot be asked for a newer" in again.events("mirror-failed")[0]["why"]
    with pytest.raises(UserError, match="no route to host; nothing is in .*new to go on from"):
        rehearse(tmp_path / "new", text_cache, checkpoint=to(tmp_path))
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_register_of_before_the_start_is_not_lost(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    folder = broken_off(text_cache, tmp_path)
    there = json.loads((tmp_path / "mirror" / "whole" / "18.json").read_text())["record"]["folder"]
    file = tmp_path / "mirror" / there / "forecasts.jsonl"
    folder.mkdir()
    line = json.loads(file.read_text().splitlines()[0])
    (folder / "forecasts.jsonl").write_text(json.dumps({**line, "code": "other"}) + "\n")
    with pytest.raises(UserError, match="is not the register that .* has: line 1"):
        rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert not (folder / "config.json").exists()


def test_a_newer_copy_comes_to_a_directory_that_keeps_its_record(
    text_cache: Path, tmp_path: Path, plain: Rehearsed, in_step: None
) -> None:
    folder = tmp_path / "run"
    rehearse(folder, text_cache, BREAK, checkpoint=to(tmp_path))
    shutil.rmtree(folder / "checkpoints")
    events = len(lines(folder / "events.jsonl"))
    again = rehearse(folder, text_cache, checkpoint=to(tmp_path))
    assert again.told("fetched")[0] == 18 and again.events("crash")
    assert len(lines(folder / "events.jsonl")) > events
    same_run(again, plain)


def test_the_last_copy_is_waited_for_until_the_deadline(
    text_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    slow = [0.3]

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/24/files/_CHECK" in key:
            time.sleep(slow[0])

    wrap(monkeypatch, tell)
    monkeypatch.setattr(mirror, "WAIT", 0.01)
    monkeypatch.setattr(mirror, "LEAVE", 0.01)
    assert rehearse(tmp_path / "run", text_cache, checkpoint=to(tmp_path)).error is None
    assert whole(tmp_path)[-1] == 24
    slow[0] = 5.0
    config = configured(text_cache)
    health = replace(config.health, save_deadline=1.0)
    own = {"checkpoint": to(tmp_path / "late"), "health": health}
    late = rehearse(tmp_path / "late" / "run", text_cache, **own)
    assert late.error is None
    assert "checkpoint 24 is not copied after 1 s" in late.told("mirror-failed")[1]


@pytest.mark.parametrize("place", ["s4://bucket/x", "runs/there", "gs://", '{"driver": "tape"}'])
def test_a_mirror_that_no_store_can_be_is_refused(place: str, text_cache: Path) -> None:
    config = configured(text_cache, checkpoint=CheckpointConfig(mirror=place))
    with pytest.raises(UserError, match="checkpoint.mirror=.*give a folder as gs://") as told:
        check(config)
    assert place in str(told.value) and "\n" not in str(told.value)


def test_a_place_can_be_a_specification(tmp_path: Path) -> None:
    spec = json.dumps({"driver": "file", "path": str(tmp_path / "a")})
    copies.Copies(spec).probe()
    copies.Copies(spec).take({"run": "x"})
    assert (tmp_path / "a" / "run.json").exists()


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


def test_lines_that_are_being_written_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for text in ("", "half", "one\n", "one\ntwo\nhalf", "one\n" + "x" * 200_000):
        file.write_text(text)
        mirror._end_with_a_line(file)
        assert file.read_text() == text[: text.rfind("\n") + 1]
