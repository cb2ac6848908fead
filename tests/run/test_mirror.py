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

ITEMS = ("state", "meta")
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


def slowly(patch: pytest.MonkeyPatch) -> None:
    """Training waits at each save until its copy is there or has failed, so that what is there at a
    break is known; and tries come soon after one another."""
    save = Trainer.save

    def saved(self: Trainer, step: int, state: Any, *, near: bool = False) -> None:
        save(self, step, state, near=near)
        self.settle_saves(step)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.config.checkpoint.mirror is not None:
            told = [e["step"] for e in self.record.read("events.jsonl") if "mirror" in e["what"]]
            if step in told:
                return
            time.sleep(0.005)

    patch.setattr(Trainer, "save", saved)
    soon(patch)


def soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mirror, "TICK", 0.01)
    patch.setattr(mirror, "WAIT", 0.01)
    patch.setattr(copies, "FIRST_WAIT", 0.001)
    patch.setattr(copies, "JITTER", 0.001)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)


@pytest.fixture(scope="module")
def broken_off(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 20, and its mirror."""
    folder = tmp_path_factory.mktemp("broken-off")
    with pytest.MonkeyPatch.context() as patch:
        slowly(patch)
        ran = rehearse(folder / "run", text_cache, BREAK, checkpoint=to(folder))
    assert isinstance(ran.error, FloatingPointError)
    assert whole(folder) == [12, 18] and not ran.events("mirror-failed")
    return folder


@pytest.fixture
def lost(broken_off: Path, tmp_path: Path) -> Path:
    """The run directory of before, which is not there; its mirror is."""
    shutil.copytree(broken_off / "mirror", tmp_path / "mirror")
    return tmp_path / "run"


@pytest.fixture
def there(plain: Rehearsed, tmp_path: Path) -> Path:
    """The directory of a whole run that has no mirror yet."""
    return Path(shutil.copytree(plain.folder, tmp_path / "run"))


def copied(
    folder: Path, text_cache: Path, tmp_path: Path, own: dict[str, Any] | None = None, **parts: Any
) -> list[tuple[str, int, str]]:
    """The events of copying what is there."""
    told = []
    config = configured(text_cache, checkpoint=to(tmp_path, **(own or {})), **parts)
    tell = lambda *event: told.append(event)  # noqa: E731
    with mirror.Mirror(config, folder, tell, writes=True) as one:
        one.end_in_order()
    return told


def brought(folder: Path, text_cache: Path, tmp_path: Path, resume: str = "auto", **parts: Any):
    own = {"checkpoint": to(tmp_path), **parts}
    bring(configured(text_cache, **own), folder, resume, lambda line: None)


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
    shutil.rmtree(files(tmp_path, 18))
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
    assert step == 18 and "copy of checkpoint 18 is broken" in why
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


def test_requests_that_fail_now_and_then_are_made_again(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    seen: dict[tuple[str, str], int] = {}

    def tell(what: str, key: str, value: Any) -> None:
        seen[what, key] = seen.get((what, key), 0) + 1
        if key and seen[what, key] % 3:
            raise OSError("try again")

    wrap(monkeypatch, tell)
    told = copied(there, text_cache, tmp_path)
    assert [(what, step) for what, step, _ in told] == [("mirrored", 24)]
    brought(tmp_path / "new", text_cache, tmp_path)
    assert seal.problem(tmp_path / "new" / "checkpoints" / "24", ITEMS) is None
    assert {what for what, key in seen if key} == {"read", "write"}


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


def test_requests_have_a_bounded_size_and_few_are_under_way(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(copies, "PART", 3_000)
    begun: list[str] = []
    sizes: list[int] = []
    most = [0]

    def tell(what: str, key: str, value: Any) -> None:
        if "/files/" in key:
            sizes.append(len(value or b""))
            begun.append(key)
            most[0] = max(most[0], len(begun))

    ask = copies.Copies._ask

    def asked(self: Any, what: str, *rest: Any) -> Any:
        found = ask(self, what, *rest)
        if what in begun:
            begun.remove(what)
        return found

    wrap(monkeypatch, tell)
    monkeypatch.setattr(copies.Copies, "_ask", asked)
    assert [what for what, _, _ in copied(there, text_cache, tmp_path)] == ["mirrored"]
    assert max(sizes) == 3_000 and len(sizes) > 60 and most[0] == copies.FLIGHT
    index = json.loads((tmp_path / "mirror" / "whole" / "24.json").read_text())
    name, one = max(index["files"].items(), key=lambda item: item[1]["parts"])
    assert one["parts"] == -(-one["size"] // 3_000) > 3
    # By hand it is put together as the module says.
    pieces = sorted(files(tmp_path, 24).glob(f"{name}.part-*"))
    data = b"".join(piece.read_bytes() for piece in pieces)
    assert data == (there / "checkpoints" / "24" / name).read_bytes()
    most[0] = 0
    brought(tmp_path / "new", text_cache, tmp_path)
    assert most[0] == copies.FLIGHT
    assert seal.problem(tmp_path / "new" / "checkpoints" / "24", ITEMS) is None


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_deleted_while_it_is_copied(
    links: bool, there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    """With hard links its copy is whole all the same, so that a slow store is not always late."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/24/files/" in key:
            shutil.rmtree(there / "checkpoints" / "24", ignore_errors=True)

    wrap(monkeypatch, tell)
    told = [(what, step) for what, step, _ in copied(there, text_cache, tmp_path)]
    # Without them the newest that is left is copied instead.
    assert told == [("mirrored", 24 if links else 18)] and whole(tmp_path) == [told[0][1]]
    brought(tmp_path / "new", text_cache, tmp_path)
    assert seal.problem(tmp_path / "new" / "checkpoints" / str(told[0][1]), ITEMS) is None


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("no links here")


def test_what_is_not_as_it_was_sealed_is_not_copied_as_whole(
    there: Path, text_cache: Path, tmp_path: Path, quick: None
) -> None:
    file = largest(there / "checkpoints" / "24")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    ((what, step, why),) = copied(there, text_cache, tmp_path)
    assert (what, step) == ("mirror-failed", 24) and "is not as it was sealed" in why
    assert whole(tmp_path) == []


def test_what_is_rolled_back_counts_no_more(
    text_cache: Path, tmp_path: Path, in_step: None
) -> None:
    guard = GuardConfig(bad_step="rollback", rewind=8)
    own = {"checkpoint": to(tmp_path, keep=4), "guard": guard}
    ran = rehearse(tmp_path / "run", text_cache, BREAK, **own)
    assert ran.error is None and "updates 7 to 20 are left out" in ran.told("rollback")[1]
    assert [event["step"] for event in ran.events("mirrored")] == [6, 12, 18, 20, 24]
    assert whole(tmp_path) == [6, 20, 24]


def test_a_copy_under_way_that_is_rolled_back_is_not_made_whole(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    config = configured(text_cache, checkpoint=to(tmp_path))
    told: list[Any] = []
    with monkeypatch.context() as patch:
        one = mirror.Mirror(config, there, lambda *event: told.append(event), writes=True)

        def tell(what: str, key: str, value: Any) -> None:
            if what == "write" and "checkpoints/24/record-1/" in key:
                one.forget(18)

        wrap(patch, tell)
        one = mirror.Mirror(config, there, lambda *event: told.append(event), writes=True)
        with one:
            one.end_in_order()
    assert not told and whole(tmp_path) == []


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


def test_of_two_starts_the_later_one_has_the_place(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    """A machine that was given up, and is not dead, makes nothing whole any more."""
    place = tmp_path / "mirror" / "run.json"

    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/24/files/" in key:
            place.write_text(json.dumps({**json.loads(place.read_text()), "start": "later"}))

    wrap(monkeypatch, tell)
    ((what, step, why),) = copied(there, text_cache, tmp_path)
    assert (what, step) == ("mirror-failed", 24) and whole(tmp_path) == []
    assert "written to by another start of this run" in why


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


@pytest.mark.parametrize("at", ["config", "record", "sign"])
def test_a_kill_while_it_is_brought(
    at: str, lost: Path, text_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever was there then, the next start has all of it."""
    brought(lost, text_cache, tmp_path)
    wanted = {f.name: f.read_text() for f in lost.iterdir() if f.suffix in (".json", ".jsonl")}
    shutil.rmtree(lost)
    counts = {"config": 1, "record": 4, "sign": 10**6}

    def stop(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def stopping(*args: Any) -> Any:
            if next(calls) >= count:
                raise KeyboardInterrupt
            return call(*args)

        return stopping

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop(counts[at], os.replace))
        patch.setattr(os, "rename", stop(0, os.rename))
        brought(lost, text_cache, tmp_path)
    assert not (lost / "checkpoints" / "18").exists()
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


def test_the_last_copy_is_waited_for_until_the_deadline(
    there: Path, text_cache: Path, tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    def tell(what: str, key: str, value: Any) -> None:
        if what == "write" and "checkpoints/24/record-1/events" in key:
            time.sleep(1.0)

    wrap(monkeypatch, tell)
    monkeypatch.setattr(mirror, "LEAVE", 0.01)
    health = replace(configured(text_cache).health, save_deadline=0.5)
    ((what, step, why),) = copied(there, text_cache, tmp_path / "late", health=health)
    assert (what, step) == ("mirror-failed", 24) and "is not copied after 0.5 s" in why
    time.sleep(1.5)
    assert whole(tmp_path / "late") == []  # nor later
    assert [what for what, _, _ in copied(there, text_cache, tmp_path)] == ["mirrored"]


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
