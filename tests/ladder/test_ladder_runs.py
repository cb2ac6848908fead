"""Real ladders of seconds: trained end to end, killed and taken up again, branched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import (
    ROOT,
    events,
    finish,
    kill_group,
    lines,
    logged,
    metrics,
    run,
    started,
    wait_until,
)

TOY = ROOT / "tests" / "ladder" / "toy.py"
# 45 seconds of processor for the four rungs; minutes where others share it.
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]


def ladder(*words: object) -> list[str]:
    return [sys.executable, "-m", "jaxmoe.ladder", *map(str, words)]


def running(out: Path, rungs: str, *more: object, family: str = "rung") -> list[str]:
    return ladder("run", "--family", f"{TOY}:{family}", "--rungs", rungs, "--out", out, *more)


@pytest.fixture(scope="module")
def toy(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rungs, of which the second was killed between two checkpoints with all its parents."""
    out = tmp_path_factory.mktemp("ladder") / "toy"
    second = out / "runs" / "rung-01-seed-0"

    def there() -> bool:
        time.sleep(0.02)  # the training needs the processor more than this test
        return (second / "checkpoints" / "16").exists() and logged(second) >= 18

    with started(running(out, "0..3"), text_cache, out.parent / "log") as process:
        wait_until(process, there, out.parent / "log")
        kill_group(process)
    assert [row["rung"] for row in lines(out / "records.jsonl")] == [0]
    with open(out / "records.jsonl", "a") as file:
        file.write('{"kind": "rung", "fam')  # as a kill leaves a line
    (out.parent / "said").write_text(finish(running(out, "0..3"), text_cache))
    return out


def test_a_killed_ladder_goes_on_where_it_was(toy: Path, text_cache: Path):
    """Finished rungs are not trained again, the cut one resumes, and each is recorded once."""
    rows = lines(toy / "records.jsonl")
    assert [(row["rung"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    runs = [toy / "runs" / f"rung-{k:02}-seed-0" for k in range(4)]
    assert [len(events(one, "start")) for one in runs] == [1, 1, 1, 1]
    assert [row["step"] for row in events(runs[1], "resume")][0] >= 16
    assert "3 trained, 1 were there, 0 failed" in (toy.parent / "said").read_text()
    again = json.loads(finish(running(toy, "0..3", "--json"), text_cache))
    assert (again["trained"], len(again["recorded"]), again["failed"]) == ([], 4, {})
    assert lines(toy / "records.jsonl") == rows


def test_records_say_what_was_trained(toy: Path):
    for row in lines(toy / "records.jsonl"):
        run_dir = toy / row["run"]
        last = metrics(run_dir)[-1]
        assert row["tokens"] == last["tokens"] == 8 * 24 * 20 * (row["rung"] + 1)
        assert row["flops"] == row["flops_spent"] == pytest.approx(last["flops"], rel=1e-3)
        evals = lines(run_dir / "evals.jsonl")
        assert row["loss"] == evals[-1]["nll"] == row["curve"][-1][2]
        assert [step for step, _, _ in row["curve"]] == [e["step"] for e in evals if e["step"]]
        assert row["params_total"] > row["params_active"] > 0
        assert row["wall_seconds"] > 0 and row["code"] and row["branch_of"] is None


def test_the_toy_ladder_is_fitted(toy: Path, text_cache: Path):
    picture = toy.parent / "p.svg"
    found = json.loads(
        finish(ladder("fit", toy, "--budget", "1e11", "--json", "--picture", picture), text_cache)
    )
    assert found["runs"] == 4 and picture.read_text().startswith("<svg")
    low, middle, high = found["optimum"]["params_active"]
    assert 0 < low < middle < high
    assert "largest rung" not in finish(
        ladder("fit", toy), text_cache
    )  # four budgets: none to spare


def test_a_branch_is_the_shorter_run_bit_for_bit(text_cache: Path, tmp_path: Path):
    """Half of rung 1, annealed: off the long run's checkpoint, and as a run of its own."""
    out, alone = tmp_path / "ladder", tmp_path / "alone"
    finish(running(out, "1", "--horizons", "0.5"), text_cache)
    branch, trunk = (out / "runs" / n for n in ("rung-01-seed-0-at-20", "rung-01-seed-0"))
    assert [row["step"] for row in events(branch, "resume")] == [15]
    assert not events(branch, "start")
    config = out / "configs" / "rung-01-seed-0-at-20.json"
    words = [sys.executable, "-m", "jaxmoe.train", "--config", str(config)]
    finish([*words, "--run-dir", str(alone)], text_cache)
    assert metrics(branch) == metrics(alone)
    assert lines(branch / "evals.jsonl") == lines(alone / "evals.jsonl")
    assert metrics(trunk)[:7] == metrics(alone)[:7] and metrics(trunk)[:10] != metrics(alone)
    long, short = lines(out / "records.jsonl")
    assert (short["tokens"], short["flops"]) == (long["tokens"] / 2, long["flops"] / 2)
    assert short["flops_spent"] == pytest.approx(short["flops"] / 4)
    assert short["branch_of"] == "rung-01-seed-0"


def test_one_rung_that_fails_leaves_the_others(text_cache: Path, tmp_path: Path):
    """And the jobs of a scheduler are this command for one rung; Ctrl-C leaves nothing running."""
    done = run(running(tmp_path / "a", "0..1", "--json", family="broken"), text_cache)
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["trained"] == ["rung-00-seed-0"]
    assert "/no/such/folder" in said["failed"]["rung-01-seed-0"]
    out = tmp_path / "b"
    with started(running(out, "2"), text_cache, tmp_path / "log") as process:
        wait_until(process, lambda: logged(out / "runs/rung-02-seed-0") >= 2, tmp_path / "log")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert "interrupted" in (tmp_path / "log").read_text()
    lock = out / "runs" / "rung-02-seed-0.lock"
    probe = "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", probe, str(lock)], check=True)


def test_a_scheduler_is_given_a_job_a_rung(toy: Path, text_cache: Path, tmp_path: Path):
    """`bash -c` as a scheduler that runs at once."""
    out = tmp_path / "jobs"
    shutil.copytree(toy, out)
    rows = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(rows[:1] + rows[2:]))
    template = "bash -c '{command}'"
    said = finish(running(out, "0..3", "--submit", template), text_cache)
    assert said.startswith("rung-01-seed-0:") and "rung-00" not in said
    assert sorted(row["rung"] for row in lines(out / "records.jsonl")) == [0, 1, 2, 3]
