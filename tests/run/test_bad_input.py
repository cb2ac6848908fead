"""A user's mistake: one clear line, exit code 2, no traceback, and nothing half-written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import SMALL, Killed, lines, run, train

from jaxmoe.train import main

Try = Callable[..., str]


@pytest.fixture
def wrong(
    tmp_path: Path, text_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., str]:
    """Runs with arguments that must be refused; returns the line that says why."""
    monkeypatch.setenv("JAXMOE_CACHE", str(text_cache))

    def attempt(*args: str, config: Path | str = SMALL, run_dir: Path | None = None) -> str:
        folder = run_dir or tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        # As many devices as this process has: the real start changes nothing then.
        argv = train(folder, "--set", "mesh.emulate=8", *args, config=config)[3:]
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("jaxmoe.train: ")
        assert said.count("\n") == 1, said
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return attempt


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("model.d_modle=3", "unknown config key 'model.d_modle'; did you mean 'd_model'?"),
        ("train.steps", "write it as KEY=VALUE"),
        ("train=3", "train is a group; set one of steps"),
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=0", "train.steps=0: Input should be greater than 0"),
        ("mesh.data=3", "the mesh data=3 needs 3 devices, but there are 8"),
        ("mesh.expert=3", "mesh.expert=3 does not divide model.n_experts=8"),
        ("mesh.model=8", "mesh.model=8 does not divide model.n_heads=4"),
        ("mesh.stage=8", "its layers dim of 2 does not divide over the mesh axes stage=8"),
        ("mesh.rounds=2", "mesh.rounds=2 needs a pipeline: set mesh.stage to more than 1"),
        ("train.batch_size=12", "train.batch_size=12 does not divide over the mesh axes"),
        ("eval.batch_size=12", "eval.batch_size=12 does not divide over the mesh axes"),
        ("eval.every=5", "eval.every=5 does not divide forecast.every=4"),
        ("data.path=/no/such/folder", "data.path=/no/such/folder: no such folder"),
        ("data.holdout=('no_such_package',)", "no_such_package"),
        ("train.seq_len=400000", "train.seq_len=400000 needs 400001 tokens"),
    ],
)
def test_values_are_refused_by_name(wrong: Try, bad: str, said: str):
    assert said in wrong("--set", bad)


def test_an_empty_folder_is_no_data(wrong: Try, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    assert "no text in it (it is empty)" in wrong("--set", f"data.path={tmp_path / 'texts'}")


def test_a_folder_with_nothing_readable_is_no_data(wrong: Try, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    assert "(1 not UTF-8)" in wrong("--set", f"data.path={tmp_path / 'texts'}")


def test_config_files_are_refused_with_the_reason(wrong: Try, tmp_path: Path):
    """Missing; no such function; a syntax error; a wrong key inside; not a Config."""
    file = tmp_path / "mine.py"
    assert "no such file" in wrong(config=file)
    assert "it has no function 'smal'; did you mean 'small'?" in wrong(config=f"{SMALL}:smal")
    for text, said in (
        ("def mine(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def mine():\n    return 3\n", "mine() returned int, not Config"),
        (
            "from jaxmoe.config import Config\n\ndef mine():\n    return Config(nmae='x')\n",
            "mine(), line 4: TypeError: ",
        ),
    ):
        file.write_text(text)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        said_now = wrong(config=file)
        assert str(file) in said_now
        assert said in said_now
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a config file must leave nothing beside it here."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_a_directory_of_somebody_else_is_not_touched(wrong: Try, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "holds something that is not a run" in wrong()
    (tmp_path / "file").write_text("")
    assert "holds something that is not a run" in wrong(run_dir=tmp_path / "file")


def test_a_damaged_config_is_named(wrong: Try, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"fingerprint": "12", "con')
    assert "config.json: not a run's config" in wrong()


def test_a_run_of_another_config_says_what_differs(wrong: Try, straight: Path):
    said = wrong("--set", "optim.lr=0.5", "--set", "train.steps=30", run_dir=straight)
    assert "optim.lr: 0.003 -> 0.5; train.steps: 24 -> 30" in said


def test_resume_must_and_never_are_obeyed(wrong: Try, straight: Path, killed: Killed):
    assert "--resume must: " in wrong("--resume", "must")
    assert "--resume never: " in wrong("--resume", "never", run_dir=killed.half)


def test_other_training_data_are_refused_on_resume(wrong: Try, killed: Killed, tmp_path: Path):
    """As a Python with other packages would give: all but the recorded fingerprint is the same."""
    run_dir = tmp_path / "half"
    shutil.copytree(killed.half, run_dir)
    file = run_dir / "environment.json"
    tree = json.loads(file.read_text())
    now, tree["data"]["fingerprint"] = tree["data"]["fingerprint"], "0123456789abcdef"
    file.write_text(json.dumps(tree))
    before = {f: f.read_bytes() for f in run_dir.rglob("*") if f.is_file()}
    said = wrong(run_dir=run_dir)
    assert f"the training data changed since this run began (0123456789abcdef -> {now})" in said
    assert {f: f.read_bytes() for f in run_dir.rglob("*") if f.is_file()} == before


def test_a_real_process_says_one_line_and_exits_2(text_cache: Path, tmp_path: Path):
    """The same as above in a process of its own: nothing else comes on stderr."""
    run_dir = tmp_path / "run"
    done = run(train(run_dir, "--set", "mesh.emulate=8", "--set", "mesh.data=3"), text_cache)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("jaxmoe.train: the mesh data=3 needs 3 devices")
    assert done.stderr.count("\n") == 1
    assert not run_dir.exists()


def test_a_finished_run_is_said_to_be_finished(
    straight: Path, text_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """With its result, exit code 0; no file changes."""
    monkeypatch.setenv("JAXMOE_CACHE", str(text_cache))
    files = [f for f in straight.rglob("*") if f.is_file()]
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    assert main(train(straight, "--set", "mesh.emulate=8")[3:]) == 0
    last = lines(straight / "evals.jsonl")[-1]
    shown = capsys.readouterr().out
    assert f"held-out {last['bits_per_byte']:.4f} bits per byte" in shown
    assert "is finished" in shown
    assert f"report: {straight / 'report.html'}" in shown
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files} == before
    assert sorted(f for f in straight.rglob("*") if f.is_file()) == sorted(files)


def test_own_texts_with_one_that_is_not_utf_8(text_cache: Path, tmp_path: Path):
    """Skipped and counted; and a loss that is not finite stops the run: exit 1, event `crash`.

    One process for both: a rate of 1e30 makes the second step's loss infinite.
    """
    texts, run_dir = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    for name in ("one", "two", "three"):
        (texts / f"{name}.txt").write_text(f"{name}: the quick brown fox. " * 60)
    (texts / "latin.txt").write_bytes("gr\u00fc\u00dfe ".encode("latin-1") * 100)
    sets = [f"--set=data.path={texts}", "--set=data.holdout=()", "--set=optim.lr=1e30"]
    done = run(train(run_dir, *sets), text_cache)
    assert f"files skipped in {texts}: 1 not UTF-8" in done.stdout, done.stderr
    data = json.loads((run_dir / "environment.json").read_text())["data"]
    assert data["skipped_files"] == {"not UTF-8": 1}
    assert done.returncode == 1
    crash = [row for row in lines(run_dir / "events.jsonl") if row["what"] == "crash"]
    assert len(crash) == 1
    assert "the train loss is" in crash[0]["why"]
    assert f"FloatingPointError: step {crash[0]['step']}" in done.stderr
    assert not any((run_dir / "checkpoints").iterdir())
