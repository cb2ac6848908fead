"""How copies of checkpoints are made and kept elsewhere, without a run."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mirrored import ITEMS, Wrapped, brought, copied, files, largest, to, whole, wrap
from rehearsal import configured

from jaxmoe.config import CheckpointConfig, replace
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.run import copies, mirror, seal


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


def test_what_no_try_can_mend_is_told_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    tries: list[str] = []

    def tell(what: str, key: str, value: Any) -> None:
        tries.append(what)
        raise ValueError("PERMISSION_DENIED: not your bucket [source locations=...]")

    wrap(monkeypatch, tell)
    with pytest.raises(copies.Unreachable, match="^probe: PERMISSION_DENIED: not your bucket$"):
        copies.Copies((tmp_path / "a").as_uri()).probe()
    assert tries == ["write"]


def test_only_what_is_of_a_step_is_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever a server lists: emulators of gs:// leave the range out of account."""
    place = copies.Copies((tmp_path / "a").as_uri())
    file = tmp_path / "file"
    file.write_text("text")
    for step in (1, 12, 2):
        place.put(f"checkpoints/{step}/files/", {"file": file})
    keys = place._store.list().result()
    listed = type("Listed", (), {"result": lambda self, timeout: keys})
    store = Wrapped(place._store, lambda *_: None)
    monkeypatch.setattr(store, "list", lambda _: listed(), raising=False)
    monkeypatch.setattr(place, "_store", store)
    assert place._names("checkpoints/1/") == ["files/file"] and place.steps() == []
    place.clear(1)
    left = sorted(f.parts[-3] for f in (tmp_path / "a").rglob("file"))
    assert left == ["12", "2"]


def test_a_place_can_be_a_specification(tmp_path: Path) -> None:
    spec = json.dumps({"driver": "file", "path": str(tmp_path / "a")})
    copies.Copies(spec).probe()
    copies.Copies(spec).take({"run": "x"})
    assert (tmp_path / "a" / "run.json").exists()


@pytest.mark.parametrize("place", ["s4://bucket/x", "runs/there", "gs://", '{"driver": "tape"}'])
def test_a_mirror_that_no_store_can_be_is_refused(place: str, text_cache: Path) -> None:
    config = configured(text_cache, checkpoint=CheckpointConfig(mirror=place))
    with pytest.raises(UserError, match="checkpoint.mirror=.*give a folder as gs://") as told:
        check(config)
    assert place in str(told.value) and "\n" not in str(told.value)


def test_lines_that_are_being_written_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for text in ("", "half", "one\n", "one\ntwo\nhalf", "one\n" + "x" * 200_000):
        file.write_text(text)
        mirror._end_with_a_line(file)
        assert file.read_text() == text[: text.rfind("\n") + 1]


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


def test_the_best_are_kept_by_the_losses_that_their_copies_know(text_cache: Path) -> None:
    config = configured(text_cache, checkpoint=CheckpointConfig(keep=1, keep_best=2, at=(5,)))
    losses = {2: 3.0, 4: 1.0, 5: 9.0, 6: None, 8: 2.0, 10: 4.0}
    assert mirror.kept(config, losses, newest=1) == {4, 5, 8, 10}
    assert mirror.kept(config, {}, newest=1) == set()
