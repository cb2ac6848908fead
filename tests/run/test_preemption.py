"""SIGTERM and SIGUSR1: the state is saved at the next step, the exit code says to run it again."""

import os
import signal
from pathlib import Path

import pytest
from processes import PATIENCE, events, finish, lines, local, logged, metrics, rank, started, train
from processes import wait_until as wait

pytestmark = pytest.mark.multiprocess


def asked_at(run_dir: Path, command: list[str], text_cache: Path, number: int) -> int:
    """Asks once six steps are logged; the exit code. The run is as long as it takes to ask."""
    log = run_dir.parent / "log"
    with started(command, text_cache, log) as process:
        wait(process, lambda: logged(run_dir) >= 7, log)
        process.send_signal(number)
        return process.wait(timeout=PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_for_bit(
    number: int, straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    never = ["--set", "checkpoint.every=1000"]
    assert asked_at(run_dir, train(run_dir, *never), text_cache, number) == 75
    (told,) = events(run_dir, "preemption")
    step = told["step"]
    assert 7 <= step < 24 and told["why"] == f"{signal.Signals(number).name}; saved at step {step}"
    assert [f.name for f in (run_dir / "checkpoints").iterdir()] == [str(step)]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and f"saved at step {step}; the same command goes on" in said
    finish(train(run_dir, *never), text_cache)
    assert [row["step"] for row in events(run_dir, "resume")] == [step]
    assert metrics(run_dir) == metrics(straight)
    assert (run_dir / "evals.jsonl").read_bytes() == (straight / "evals.jsonl").read_bytes()


def test_what_one_of_two_processes_hears_stops_both_at_one_step(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    """Rank 1 alone is asked, and writes no record; rank 0 stops with it, and the launcher ends
    with 75, as it does when it is asked itself."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = local(2, run_dir, "--set", "checkpoint.every=1000")
    with started(command, text_cache, log) as process:
        wait(process, lambda: logged(run_dir) >= 3, log)
        os.kill(rank(process, 1), signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 75, log.read_text()[-3000:]
    (told,) = events(run_dir, "preemption")
    assert told["why"] == f"another process was asked to end; saved at step {told['step']}"
    assert asked_at(run_dir, command, text_cache, signal.SIGTERM) in (75, 0)
    if len(events(run_dir, "preemption")) == 2:
        finish(command, text_cache)
    steps = [row["step"] for row in lines(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, 25))
    mine, theirs = (metrics(one)[-1]["train/nll"] for one in (run_dir, straight))
    assert mine == pytest.approx(theirs, rel=1e-5)
