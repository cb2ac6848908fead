"""Run directories and checkpoints that somebody has cut, edited or made to do harm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hostile import (
    DEEP,
    VALUES,
    asked,
    bent,
    examples,
    forged,
    of_json,
    of_lines,
    of_values,
    raw,
    refused,
    snapshot,
)
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from test_old_checkpoints import aged, config, corpus, losses, ran, trainer

from jaxmoe import replay, supervise, train
from jaxmoe.config import CheckpointConfig, FaultConfig
from jaxmoe.data.__main__ import main as data
from jaxmoe.data.cache import Corpus
from jaxmoe.errors import UserError
from jaxmoe.forecast.__main__ import main as forecast
from jaxmoe.ladder.__main__ import main as ladder
from jaxmoe.report.__main__ import main as report
from jaxmoe.run import meta, record, seal
from jaxmoe.run.again import checkpoint_before
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.run.faults import Faults
from jaxmoe.run.forecasting import ForecastHook
from jaxmoe.run.params import open_params
from jaxmoe.run.tiers import near_folder

__all__ = ["corpus", "ran"]  # fixtures

LINES = st.one_of(raw(), of_lines(), of_lines(), of_lines())
TREE = st.one_of(raw(), of_json(), of_json(), of_json())


@pytest.fixture(scope="module")
def run(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and beside it the same again; layers were recorded at two steps."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(straight, folder / "run")
    layer = {"sum": [1, 2], "rms": [0.5, 0.25]}
    rows = [{"step": step, "arrays": {"head": layer}} for step in (6, 12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "run" / record.LAYERS).write_text(text)
    shutil.copytree(folder / "run", folder / "again")
    return folder / "run"


def read_by_all(run: Path, name: str) -> None:
    """Every command that reads the file. None writes but the page, and that where it is told."""
    (run / "page.html").unlink(missing_ok=True)
    outside = snapshot(run.parent)
    page, again = run / "page.html", run.parent / "again"
    commands: dict[str, Callable[[], Any]] = {
        "report": lambda: asked(report, str(run), "--out", str(page), "--json"),
        "diff": lambda: asked(report, "diff", str(run), str(again), "--json"),
        "verify": lambda: asked(forecast, "verify", str(run), "--json"),
        "score": lambda: asked(forecast, "score", str(run), "--json"),
        "fit": lambda: asked(forecast, "fit", str(run), "--at", "14", "--json"),
        "supervise": lambda: refused(lambda: supervise.furthest_step(run), run),
        "finished": lambda: refused(lambda: record.finished(run), run),
        "data": lambda: refused(lambda: record.check_data(run, "0123"), run),
        "config": lambda: refused(lambda: record.read_config(run), run),
        "params": lambda: refused(lambda: open_params(run), run),
        "replay": lambda: refused(lambda: replay.left_out(run, 6, 18), run),
    }
    for command in READERS[name]:
        commands[command]()
    page.unlink(missing_ok=True)
    before = {k: v for k, v in outside.items() if k != str(run)}
    assert {k: v for k, v in snapshot(run.parent).items() if k != str(run)} == before


READERS = {
    "config.json": ("report", "diff", "fit", "config", "params"),
    "environment.json": ("report", "diff", "data"),
    "schedule.json": ("verify", "fit"),
    "forecasts.head.json": ("verify", "score"),
    "metrics.jsonl": ("report", "diff", "supervise"),
    "evals.jsonl": ("report", "diff", "verify", "score", "fit", "finished"),
    "events.jsonl": ("report", "verify", "supervise", "finished", "replay"),
    "layers.jsonl": ("diff",),
    "forecasts.jsonl": ("report", "verify", "score"),
    "checkpoints/24/meta/metadata": ("verify",),
}


@pytest.mark.parametrize("name", READERS)
@given(draw=st.data())
@examples(60)
def test_any_file_of_a_run_is_read_or_named(run: Path, name: str, draw: st.DataObject) -> None:
    """Cut, flipped, of other types, too deep, no UTF-8, a folder."""
    change = draw.draw(LINES if name.endswith("jsonl") else TREE)
    with bent(run / name, change):
        read_by_all(run, name)


@given(change=of_values())
@examples(60)
def test_whoever_forges_a_register_is_refused_in_one_line(
    run: Path, corpus: Corpus, change: Any
) -> None:
    """The chain proves the order, not the values: they are looked at where they are used."""
    head = run / "forecasts.head.json"
    kept = head.read_bytes()
    checkpoints = run / record.CHECKPOINTS
    checkpoints.rename(run / "away")  # they hold the true register's head
    try:
        with bent(run / "forecasts.jsonl", forged(change, head)):
            read_by_all(run, "forecasts.jsonl")
            refused(lambda: ForecastHook(config(), run, held_out_of(run), lambda *_: None))
    finally:
        (run / "away").rename(checkpoints)
        head.write_bytes(kept)


def held_out_of(run: Path) -> Any:
    """As much of an EvalSet as a hook asks for."""
    row = json.loads((run / "forecasts.jsonl").read_text().split("\n")[0])
    name = row.get("set_fingerprint") if isinstance(row, dict) else None
    held_out = SimpleNamespace(name="holdout", fingerprint=name)
    return SimpleNamespace(held_out=held_out, train_fingerprint="text", leaking=0)


# Checkpoints


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "[[1]]", '"a"', "{}", '{"../../x": "0"}', '{"/etc/passwd": null}', "[" * DEEP],
    ids=lambda text: text[:20],
)
def test_a_seal_of_any_form_is_of_no_whole_checkpoint(run: Path, text: str) -> None:
    """Names in it are compared with those of the files there, and never opened."""
    with bent(run / "checkpoints" / "24" / seal.FILE, lambda _: text.encode()):
        assert seal.problem(run / "checkpoints" / "24", ITEMS) is not None
        assert checkpoint_before(run, 24).name == "18"
        assert open_params(run).where.name == "18"


@given(change=of_json())
@examples(200)
def test_any_meta_is_taken_or_named(run: Path, change: Any) -> None:
    """What is taken has every value of its type; so a resume does not fail half-way."""
    file = run / "checkpoints" / "24" / "meta" / "metadata"
    with bent(file, change):
        if refused(lambda: meta.read(file.parents[1]), file.parents[1]) is None:
            found = json.loads(file.read_text())
            assert all(type(found[key]) is int for key in ("step", "position"))
            assert all(isinstance(step + loss + 0.5, float) for step, loss in found["forecast"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("forecast", [[1]]),
        ("forecast", "../../x"),
        ("seconds", "1"),
        ("seconds", float("nan")),
        ("position", None),
        ("config", {"mesh": {"rounds": "2"}}),
        ("config", []),
        ("guard", {"good": [[1, 2]], "bad": [], "skipped": 0}),
        ("code", {"bits": {"train": "1"}, "tokens": {}, "known": True}),
        ("spikes", [["a"], []]),
        ("closely", [10**400]),
        ("register", 3),
    ],
    ids=str,
)
def test_a_sealed_checkpoint_of_other_types_is_set_aside(
    ran: Path, corpus: Corpus, mesh: Mesh, tmp_path: Path, key: str, value: Any
) -> None:
    """Whoever makes a checkpoint can seal it too: the one before is taken, and the event says why;
    where there is none, nothing is begun anew and nothing of the record is cut off."""
    run_dir = aged(ran, tmp_path / "run", lambda saved: saved.update({key: value}))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be restored \(4: ") as caught:
        trainer(corpus, mesh, run_dir).prepare()
    assert str(caught.value).isprintable() and "its meta" in str(caught.value)
    assert losses(run_dir) == losses(ran)
    assert not [p for p in tmp_path.iterdir() if p.name != "run"]


def resaved(checkpoint: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> None:
    """The state written again by orbax with some of its arrays changed, and sealed."""
    with ocp.StandardCheckpointer() as writer:
        state = writer.restore(checkpoint / "state")
        shutil.rmtree(checkpoint / "state")

        def walk(name: str, tree: Any) -> Any:
            if isinstance(tree, dict):
                found = {k: walk(f"{name}/{k}", v) for k, v in tree.items()}
                return {k: v for k, v in found.items() if v is not None}
            if isinstance(tree, list | tuple):
                return [walk(f"{name}/{k}", v) for k, v in enumerate(tree)]
            return tree if tree is None else change(name, np.asarray(tree))

        writer.save(checkpoint / "state", walk("", state))
    seal.write(checkpoint, ITEMS)


@pytest.mark.parametrize("kind", ["shape", "missing", "step", "integers"])
def test_arrays_of_another_form_are_refused(
    ran: Path, corpus: Corpus, mesh: Mesh, tmp_path: Path, kind: str
) -> None:
    """Never broadcast, cut or converted: a checkpoint of other arrays is of another run."""

    def change(name: str, array: np.ndarray) -> np.ndarray | None:
        if kind == "step":
            return np.asarray(7, array.dtype) if name == "/step" else array
        if "params" not in name or array.ndim != 2 or name.startswith("/opt"):
            return array
        if kind == "integers":
            return array.astype(np.int8)
        return None if kind == "missing" else np.concatenate([array, array])

    run_dir = aged(ran, tmp_path / "run", lambda saved: None)
    resaved(run_dir / "checkpoints" / "4", change)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be restored \(4: ") as caught:
        trainer(corpus, mesh, run_dir).prepare()
    assert str(caught.value).isprintable()
    assert losses(run_dir) == losses(ran)


@given(draw=st.data())
@examples(60)
def test_any_damage_under_a_seal_is_refused_by_who_reads_parameters(
    run: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    """A file of the storage layer, changed and sealed again."""
    folder = tmp_path_factory.mktemp("sealed") / "run"
    shutil.copytree(run, folder)
    checkpoint = folder / "checkpoints" / "24"
    shutil.rmtree(folder / "checkpoints" / "18")
    there = sorted(f for f in (checkpoint / "state").rglob("*") if f.is_file())
    file = draw.draw(st.sampled_from([f.relative_to(folder) for f in there]))
    with bent(folder / file, draw.draw(raw())):
        seal.write(checkpoint, ITEMS)

        def read() -> None:
            params = open_params(folder)
            params.read("embed")

        refused(read, folder)
    shutil.rmtree(folder.parent)


# What becomes a path, or says what was done


@pytest.mark.parametrize("text", ["../../evil", "/tmp/evil", "", "a/b", "\0", ".", "x" * 32])
def test_the_name_of_the_near_place_leads_nowhere(tmp_path: Path, text: str) -> None:
    """It is a folder below checkpoint.near, whose old checkpoints are deleted."""
    (tmp_path / "near.txt").write_text(text)
    own = CheckpointConfig(near=str(tmp_path / "near"))
    before = snapshot(tmp_path)
    assert refused(lambda: near_folder(tmp_path, own), tmp_path / "near.txt")
    assert snapshot(tmp_path) == before
    (tmp_path / "near.txt").unlink()
    drawn = near_folder(tmp_path, own)
    assert drawn is not None and drawn.parent == tmp_path / "near"
    assert near_folder(tmp_path, own) == drawn  # and it is read again


@given(change=LINES)
@examples(60)
def test_any_list_of_rehearsed_faults_is_read_or_named(run: Path, mesh: Mesh, change: Any) -> None:
    file = run / "faults.jsonl"
    rows = [{"fault": n, "of": "0123", "kind": "slow", "step": n, "time": ""} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = record.replace(config(), faults=(FaultConfig(kind="slow", step=2),))
    with bent(file, change):
        refused(lambda: Faults(wanted, mesh, None, run, lambda *_: None), file)
    file.unlink()


def test_a_command_on_a_damaged_run_says_one_line(run: Path, monkeypatch: Any) -> None:
    """Of each command that begins with a run directory, up to where its data would be read."""

    def stop(*_: Any) -> None:
        raise UserError("the data are read from here on")

    for module in (train, replay):
        monkeypatch.setattr(module, "open_corpus", stop)
        monkeypatch.setattr(module.platform, "start", lambda _: None)
    records = Path(__file__).parents[2] / "benchmarks" / "records" / "ladder_moe"
    for value in (*VALUES[:20:3], None):
        for name in ("config.json", "events.jsonl"):
            text = (json.dumps(value) + "\n").encode() if value is not None else b"\xff\n"
            with bent(run / name, lambda _, text=text: text):
                for main, argv in (
                    (train.main, ["--config", str(run / "config.json"), "--run-dir", str(run)]),
                    (replay.main, [str(run), "--step", "20"]),
                    (data, ["inspect", str(run), "--step", "1"]),
                    (ladder, ["add", str(run), "--ladder", str(records), "--rung", "9"]),
                ):
                    if name == "config.json" or main is train.main:
                        assert asked(main, *argv, codes=())[0] == 2


@pytest.mark.parametrize("what", ["missing", "a file", "empty"])
def test_no_run_at_all_is_said_in_one_line(tmp_path: Path, what: str) -> None:
    place = tmp_path / "run"
    if what != "missing":
        place.mkdir() if what == "empty" else place.write_text("")
    for main, argv in (
        (report, [str(place)]),
        (report, ["diff", str(place), str(place)]),
        (forecast, ["verify", str(place)]),
        (forecast, ["score", str(place)]),
        (forecast, ["fit", str(place)]),
        (replay.main, [str(place), "--step", "1"]),
        (data, ["inspect", str(place), "--step", "1"]),
        (data, ["verify", str(place)]),
        (supervise.main, ["--run-dir", str(place), "--", "no-such-command-anywhere"]),
    ):
        assert asked(main, *argv, codes=())[0] == 2
