"""Whether a scheduler may start a run once more."""

import json
from pathlib import Path

import pytest
from processes import SMALL

from jaxmoe.restarts import fruitless, main


def ask(run: Path, *words: str, job: str = "7") -> int:
    return main(["--job", job, *words, "--", "--run-dir", str(run), "--resume", "auto"])


def log(run: Path, step: int) -> None:
    run.mkdir(exist_ok=True)
    with open(run / "metrics.jsonl", "a") as out:
        out.write(json.dumps({"step": step}) + "\n")


def test_the_third_start_without_a_step_forward_is_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a start and after it the answer is the same; it is given once, then all is new."""
    run = tmp_path / "run"
    for _ in range(2):
        assert ask(run, "--note") == 0 and ask(run) == 0
    assert ask(run, "--note") == 0
    assert ask(run) == 4
    assert "3 starts in a row with nothing beyond step 0, giving up" in capsys.readouterr().err
    assert ask(run, "--note") == 0


def test_a_step_forward_sets_the_count_back_and_one_reached_again_does_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 3, 5):  # steps that the three starts got to
        assert ask(run, "--note") == 0
        log(run, step)
        assert ask(run) == 0
    assert ask(run, "--note") == 0
    assert ask(run) == 4
    for step in range(6, 20):
        assert ask(run, "--note") == 0
        log(run, step)
    assert ask(run) == 0


def test_jobs_are_counted_by_themselves_and_forgotten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for job in ("1", "2"):
        assert ask(run, "--note", "--patience", "2", job=job) == 0
        assert ask(run, "--patience", "2", job=job) == 0
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["run.starts-1", "run.starts-2"]
    assert ask(run, "--forget", job="1") == 0 and ask(run, "--forget", job="1") == 0
    assert [f.name for f in tmp_path.iterdir()] == ["run.starts-2"]


def test_starts_are_counted_from_the_last() -> None:
    assert fruitless([], 0) == 0
    assert fruitless([0], 0) == 1
    assert fruitless([0, 0, 4, 4], 4) == 2
    assert fruitless([0, 4, 4], 5) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", str(SMALL), "--set", "model.d_modle=3"], "model.d_modle"),
        (["--config", "none.py", "--run-dir", "x"], "none.py"),
        (["--config", str(SMALL), "--set", "model.n_heads=3"], "n_heads"),
        (["--resume", "auto"], "say where the run is"),
    ],
)
def test_a_mistake_in_the_config_is_told_before_there_is_a_job_to_end(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--job", "7", "--note", "--", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_without_a_directory_is_where_train_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--job", "7", "--note", "--", "--config", str(SMALL)]) == 0
    assert (tmp_path / "runs" / "small.starts-7").read_text() == "0\n"
