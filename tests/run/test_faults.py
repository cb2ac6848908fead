"""Each fault that can be rehearsed: what finds it, when, and what follows (docs/reliability.md).

What is not found is here as well. Those of one state's copies are in test_checksums.py, hangs and
slow processes in test_watchdog.py, damaged data in test_damaged.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import PATIENCE, environment, events, finish, lines, logged, metrics, run, train
from processes import wait_until as wait
from rehearsal import Rehearsed, rehearse
from small import small

from jaxmoe.config import FaultConfig, GuardConfig, HealthConfig, replace
from jaxmoe.data.damage import Damaged
from jaxmoe.errors import UserError

SKIP = GuardConfig(bad_step="skip")
LONGER = replace(small().train, steps=72)


def sets(**fault: Any) -> tuple[str, str]:
    return "--set", f"faults={json.dumps([fault])}"


def found(ran: Rehearsed) -> list[tuple[str, int]]:
    """What the run found, beside an alarm of a run as small as this one (step 22, too good)."""
    kinds = ("skip", "rollback", "corruption", "crash", "alarm")
    rows = [(kind, row["step"]) for kind in kinds for row in ran.events(kind)]
    return [row for row in rows if row != ("alarm", 22)]


@pytest.mark.multiprocess
def test_a_kill_strikes_once_and_nothing_is_lost(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = train(run_dir, *sets(kind="kill", step=15))
    assert run(command, text_cache).returncode == -signal.SIGKILL
    finish(command, text_cache)
    assert metrics(run_dir) == metrics(straight)
    assert (run_dir / "evals.jsonl").read_bytes() == (straight / "evals.jsonl").read_bytes()
    (line,) = lines(run_dir / "faults.jsonl")
    assert (line["fault"], line["kind"], line["step"]) == (0, "kill", 15)
    (told,) = events(run_dir, "fault")
    assert told["why"] == "rehearsed: kill, as faults[0] says"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "victim, by",
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["coordinator", "other", "frozen"],
)
def test_the_survivor_of_two_ends_within_seconds(
    victim: int, by: signal.Signals, text_cache: Path, tmp_path: Path
) -> None:
    """Without a launcher that would end it. A frozen one closes no connection, as a machine without
    power does not: only `health.peer_deadline` (10 s) finds it."""
    run_dir = tmp_path / "run"
    port = free_port()
    mesh = ("--set", "mesh.expert=2", "--set", "mesh.model=2", "--set", "mesh.data=2")
    command = train(run_dir, *mesh, "--set", "train.steps=100000")
    processes, logs = [], []
    for rank in (0, 1):
        own = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAXMOE_NUM_PROCESSES": "2",
            "JAXMOE_PROCESS_ID": str(rank),
        }
        logs.append(tmp_path / f"log-{rank}")
        with open(logs[-1], "w") as out:
            env = {**environment(text_cache), **own}
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        wait(processes[0], lambda: logged(run_dir) >= 3, logs[0])
        processes[victim].send_signal(by)
        began = time.monotonic()
        code = processes[1 - victim].wait(timeout=PATIENCE)
        assert time.monotonic() - began < 15
        assert code not in (0, 2, 75), logs[1 - victim].read_text()[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_full_disk_is_told_and_training_goes_on(text_cache: Path, tmp_path: Path) -> None:
    plain = rehearse(tmp_path / "plain", text_cache)
    ran = rehearse(tmp_path / "run", text_cache, FaultConfig(kind="disk-full", step=12))
    assert ran.error is None and ran.metrics == plain.metrics
    step, why = ran.told("save-failed")
    assert step == 18 and why.startswith("checkpoint 12 could not be saved: ") and "No space" in why
    assert sorted(os.listdir(ran.folder / "checkpoints")) == ["18", "24"]


def test_a_run_whose_last_state_is_not_saved_says_so(text_cache: Path, tmp_path: Path) -> None:
    full = FaultConfig(kind="disk-full", step=24)
    ran = rehearse(tmp_path / "run", text_cache, full)
    assert isinstance(ran.error, UserError) and "checkpoint 24 could not be saved" in str(ran.error)
    assert not ran.events("done")
    again = rehearse(tmp_path / "run", text_cache, full)
    assert again.error is None and again.events("done")


@pytest.mark.multiprocess
def test_files_that_the_system_refuses_to_write_do_not_end_training(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    """A real limit: no file may grow beyond 20 kB, as those of checkpoints and the metrics do."""
    run_dir = tmp_path / "run"
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    limit += "sys.argv[0] = 'train'; runpy.run_module('jaxmoe.train', run_name='__main__')"
    command = train(run_dir)
    done = run([sys.executable, "-c", limit, *command[3:]], text_cache)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "jaxmoe.train: checkpoint 24 could not be saved" in done.stderr
    assert "metrics.jsonl: File too large; its lines are kept" in done.stderr
    assert len(events(run_dir, "save-failed")) == 3
    rows = metrics(run_dir)
    assert 10 < len(rows) < 24 and rows == metrics(straight)[: len(rows)]
    left = [f.name for f in (run_dir / "checkpoints").iterdir()]
    assert left in ([], ["24.orbax-checkpoint-tmp"])  # the next start removes it
    finish(command, text_cache)
    assert metrics(run_dir) == metrics(straight)


@pytest.mark.parametrize("kind", ["truncate-checkpoint", "flip-checkpoint"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    kind: Any, text_cache: Path, tmp_path: Path
) -> None:
    """Found as the run resumes: by its SHA-256."""
    plain = rehearse(tmp_path / "plain", text_cache)
    damage = FaultConfig(kind=kind, step=12, index=100)
    stop = FaultConfig(kind="nan-gradient", step=16)
    cut = rehearse(tmp_path / "run", text_cache, damage, stop)
    assert isinstance(cut.error, FloatingPointError)
    again = rehearse(tmp_path / "run", text_cache, damage, stop)
    assert again.error is None and again.metrics == plain.metrics
    assert again.told("fallback")[0] == 12 and again.told("resume")[0] == 6


def test_a_flipped_exponent_of_a_gradient_is_a_bad_step(text_cache: Path, tmp_path: Path) -> None:
    """In one replica, before gradients are added up: all replicas take the same wrong sum, so that
    copies agree, and the norm alone tells."""
    flip = FaultConfig(kind="flip-gradient", step=60, bit=30, array="router", device=2)
    axes = {"replica": 2, "data": 2}
    ran = rehearse(tmp_path / "run", text_cache, flip, guard=SKIP, train=LONGER, axes=axes)
    assert ran.error is None and ("skip", 60) in found(ran) and not ran.events("corruption")


@pytest.mark.parametrize(
    ("fault", "axes"),
    [
        (FaultConfig(kind="flip-gradient", step=60, bit=3, array="router"), {"replica": 2}),
        (FaultConfig(kind="flip-parameter", step=60, bit=20, array="router"), {"data": 2}),
    ],
    ids=["a low bit of a gradient", "a bit without a copy"],
)
def test_flips_that_are_not_found(
    fault: FaultConfig, axes: dict[str, int], text_cache: Path, tmp_path: Path
) -> None:
    ran = rehearse(tmp_path / "run", text_cache, fault, guard=SKIP, train=LONGER, axes=axes)
    assert ran.error is None and ran.events("fault") and found(ran) == []


def test_a_rate_that_slips_far_is_found_and_a_little_is_not(
    text_cache: Path, tmp_path: Path
) -> None:
    far = FaultConfig(kind="rate-slip", step=50, factor=100.0, steps=22)
    ran = rehearse(tmp_path / "far", text_cache, far, train=LONGER)
    assert ("alarm", 50) in found(ran) or ("alarm", 52) in found(ran)
    near = replace(far, factor=3.0)
    assert found(rehearse(tmp_path / "near", text_cache, near, train=LONGER)) == []


def test_a_zeroed_expert_is_found_by_its_size(text_cache: Path, tmp_path: Path) -> None:
    """At the next record of the layers; the loss moves by less than its noise."""
    zeroed = FaultConfig(kind="zero-expert", step=50, expert=2)
    often = HealthConfig(statistics_every=12)
    ran = rehearse(tmp_path / "run", text_cache, zeroed, train=LONGER, health=often)
    step, why = ran.told("expert")
    assert step == 60 and "an expert has 0.0" in why and "of the middle one's size, and 5" in why
    assert why.startswith("layers/") and found(ran) == []


def test_what_is_not_found(text_cache: Path, tmp_path: Path) -> None:
    """It happens, as the losses say, and no alarm follows."""
    fault = FaultConfig(kind="duplicate-data", step=50, steps=10)
    ran = rehearse(tmp_path / "run", text_cache, fault, train=LONGER)
    sound = rehearse(tmp_path / "sound", text_cache, train=LONGER)
    mine, theirs = ([row["train/nll"] for row in one.metrics] for one in (ran, sound))
    assert mine[:49] == theirs[:49] and mine[51] != theirs[51]
    assert ran.events("fault") and found(ran) == []


def test_a_damaged_shard_stops_the_run_and_is_gone_with_the_rehearsal(
    text_cache: Path, tmp_path: Path
) -> None:
    """Found by its SHA-256 as it is read; the file itself stays as it is."""
    plain = rehearse(tmp_path / "plain", text_cache)
    harm = FaultConfig(kind="damage-shard", step=10)
    ran = rehearse(tmp_path / "run", text_cache, harm)
    assert isinstance(ran.error, Damaged) and "its SHA-256 is" in str(ran.error)
    assert ran.told("fault")[0] == 10 and "has changed" in ran.told("damaged")[1]
    again = rehearse(tmp_path / "run", text_cache, harm)
    assert again.error is None and again.metrics == plain.metrics


def test_another_fault_in_the_same_place_is_not_taken_for_the_one_behind(
    text_cache: Path, tmp_path: Path
) -> None:
    first = rehearse(tmp_path / "run", text_cache, FaultConfig(kind="nan-gradient", step=8))
    assert first.error is not None
    second = rehearse(tmp_path / "run", text_cache, FaultConfig(kind="nan-gradient", step=9))
    assert second.error is not None and [r["step"] for r in second.events("crash")] == [8, 9]


def test_duplicated_data_is_the_same_batch_again(text_cache: Path, tmp_path: Path) -> None:
    """The loss of a batch that was just learnt falls."""
    twice = FaultConfig(kind="duplicate-data", step=10, steps=10)
    ran = rehearse(tmp_path / "run", text_cache, twice)
    losses = np.array([row["train/nll"] for row in ran.metrics])
    assert (np.diff(losses[8:19]) < 0).all()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (FaultConfig(kind="zero-expert", step=3, expert=8), "no expert 8"),
        (FaultConfig(kind="flip-parameter", step=3, device=1), "no device 1 among 1"),
        (FaultConfig(kind="nan-gradient", step=3, array="wx"), "has 'wx' in it"),
        (FaultConfig(kind="kill", step=3, rank=1), "no rank 1 of 1"),
    ],
)
def test_a_fault_that_cannot_strike_is_refused(
    fault: FaultConfig, named: str, text_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        rehearse(tmp_path / "run", text_cache, fault)
