"""The run directory's own rules, without a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from small import small

from jaxmoe.config import MeshConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.run.record import RunRecord, check_data, check_directory, finished, read_lines


def row(step: int, nll: float) -> dict[str, Any]:
    return {"step": step, "tokens": 8 * step, "set": "h", "set_fingerprint": "f", "nll": nll}


@pytest.fixture
def mine(tmp_path: Path) -> RunRecord:
    made = RunRecord(tmp_path / "run", writes=True)
    made.begin(small())
    return made


def test_a_kill_while_the_first_file_is_written_leaves_a_directory_to_start_in(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json.tmp").write_text('{"fing')
    check_directory(run_dir, small(), "auto")
    with pytest.raises(UserError, match="holds no run"):
        check_directory(run_dir, small(), "must")


def test_a_run_may_go_on_with_another_name_mesh_or_checkpoint_rhythm(mine: RunRecord):
    other = replace(small(), name="other", mesh=MeshConfig(expert=4))
    check_directory(mine.folder, replace(other, checkpoint=type(other.checkpoint)(every=1)), "auto")
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        check_directory(mine.folder, replace(small(), seed=1), "auto")


def test_rewinding_drops_later_metrics_and_torn_lines_only(mine: RunRecord):
    for step in (1, 2, 3):
        mine.append("metrics.jsonl", {"step": step})
        mine.evaluated(row(step, 1.0))
    for name in ("metrics.jsonl", "evals.jsonl"):
        with open(mine.folder / name, "a") as file:
            file.write('{"step": 4, "nl')
    mine.rewind(2)
    assert read_lines(mine.folder / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_lines(mine.folder / "evals.jsonl") == [row(s, 1.0) for s in (1, 2, 3)]
    assert (mine.folder / "evals.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("again", [(3.0, 2.0), (3.1, 2.0), (3.0, 2.1), (3.1, 2.1)])
def test_the_evals_that_stand_are_those_that_the_resumed_run_saw(
    mine: RunRecord, again: tuple[float, float]
):
    """Each of them may or may not come out equal on another mesh: the forecast's view of the file
    is what the run saw, in every case. (Once, a step that came out equal after one that did not
    was left out, and so was lost to the register.)"""
    for step, nll in ((2, 4.0), (4, 3.0), (6, 2.0)):
        mine.evaluated(row(step, nll))
    for step, nll in zip((4, 6), again, strict=True):  # from a checkpoint at step 2 or 3
        mine.evaluated(row(step, nll))
    rows = register.read_evals(mine.folder / "evals.jsonl")
    seen = register.observations(rows, set_fingerprint="f", until=6)
    assert seen == ([2, 4, 6], [4.0, *again])
    if again == (3.0, 2.0):
        assert len(rows) == 3


def test_only_the_writing_process_leaves_anything(tmp_path: Path):
    silent = RunRecord(tmp_path / "run", writes=False)
    silent.begin(small())
    silent.event("start", step=0, why="")
    silent.update("environment.json", {"a": 1})
    silent.evaluated(row(1, 2.0))
    silent.rewind(0)
    assert not (tmp_path / "run").exists()


def test_finished_is_what_ended_with_an_eval(mine: RunRecord):
    whole = {**row(6, 2.0), "bits_per_byte": 2.9, "set_fingerprint": "a"}
    mine.evaluated(whole)
    assert finished(mine.folder) is None
    mine.event("done", step=6, why="")
    assert finished(mine.folder) == whole


def test_data_may_not_change_under_a_run(mine: RunRecord):
    check_data(mine.folder, "a")  # killed before it said what it trains on
    mine.write("environment.json", {"data": {"fingerprint": "a"}})
    check_data(mine.folder, "a")
    with pytest.raises(UserError, match=r"the training data changed since this run began"):
        check_data(mine.folder, "b")


def test_every_line_is_there_at_once(mine: RunRecord):
    """A reader sees whole lines: nothing waits in a buffer."""
    mine.event("start", step=0, why="x")
    assert json.loads((mine.folder / "events.jsonl").read_text())["what"] == "start"


def test_lines_that_cannot_be_written_come_with_the_next_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder stands where the file goes, until it does not."""
    run = RunRecord(tmp_path, writes=True)
    (tmp_path / "metrics.jsonl").mkdir()
    run.append("metrics.jsonl", {"step": 1})
    run.append("metrics.jsonl", {"step": 2})
    assert "its lines are kept until they can be written" in capsys.readouterr().err
    with pytest.raises(UserError, match="could not be written"):
        run.check()
    (tmp_path / "metrics.jsonl").rmdir()
    run.append("metrics.jsonl", {"step": 3})
    run.check()
    assert [row["step"] for row in run.read("metrics.jsonl")] == [1, 2, 3]
