"""Deadlines, and which process is slow."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import events, finish, local, run, train

from jaxmoe.run.pace import slowest

HANG = 'faults=[{"kind":"hang","step":8,"rank":%d}]'


@pytest.mark.multiprocess
def test_a_run_that_hangs_says_where_and_ends_and_goes_on(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = train(run_dir, "--set", HANG % 0, "--set", "health.step_deadline=10")
    began = time.monotonic()
    done = run(command, text_cache)
    assert done.returncode == 6, done.stderr[-2000:]
    assert time.monotonic() - began < 90
    (told,) = events(run_dir, "hang")
    assert told["why"].startswith("step 7 (the last that was read is 6) took more than 10 s")
    stacks = (run_dir / "stacks-rank-0.txt").read_text()
    assert "in _halt" in stacks and "in _run" in stacks and "Traceback" not in done.stderr
    assert "stacks-rank-0.txt" in done.stderr
    finish(command, text_cache)  # it strikes once
    assert (run_dir / "evals.jsonl").read_bytes() == (straight / "evals.jsonl").read_bytes()


@pytest.mark.multiprocess
def test_both_processes_say_where_they_stand_when_one_hangs(
    text_cache: Path, tmp_path: Path
) -> None:
    """The one that hangs, and the one that waits for it in a collective."""
    run_dir = tmp_path / "run"
    deadline = ("--set", "health.step_deadline=8")
    done = run(local(2, run_dir, "--set", HANG % 1, *deadline), text_cache)
    assert done.returncode == 6, done.stderr[-2000:]
    hung, waits = (run_dir / f"stacks-rank-{rank}.txt" for rank in (1, 0))
    assert "in _halt" in hung.read_text()
    assert "in _halt" not in waits.read_text() and "in _run" in waits.read_text()


@pytest.mark.multiprocess
def test_a_slow_process_is_named(text_cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    slow = {"kind": "slow", "step": 4, "rank": 1, "seconds": 0.4, "steps": 20}
    sets = ("--set", f"faults={json.dumps([slow])}", "--set", "train.log_every=3")
    finish(local(2, run_dir, *sets), text_cache)
    (told,) = events(run_dir, "slow")
    assert told["why"].startswith("rank 1 spends 0.") and 9 <= told["step"] <= 24


def test_slow_is_twice_the_middle_and_a_tenth_of_a_step() -> None:
    assert slowest(np.array([0.1, 0.1, 0.5]), 1.0, 2.0) == 2
    assert slowest(np.array([0.5, 0.01]), 1.0, 2.0) == 0  # of two, the faster is the middle
    assert slowest(np.array([0.1, 0.1, 0.15]), 1.0, 2.0) is None
    assert slowest(np.array([0.001, 0.001, 0.05]), 1.0, 2.0) is None
    assert slowest(np.array([3.0, 3.0, 3.1]), 5.0, 2.0) is None


@pytest.mark.multiprocess
def test_a_deadline_ends_a_process_whose_main_thread_cannot(tmp_path: Path) -> None:
    """It waits where Python has no say; exit code 6, and the stacks are there."""
    code = f"""
import threading
from pathlib import Path
from jaxmoe.run.watchdog import Watchdog
here = Path({str(tmp_path)!r})
dog = Watchdog(here, (here / "told").write_text)
dog.start()
dog.expect("nothing", 0)
dog.expect("a lock", 0.5)
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 6, done.stderr
    assert (tmp_path / "told").read_text().startswith("a lock took more than 0.5 s")
    assert "<module>" in (tmp_path / "stacks-rank-0.txt").read_text()
