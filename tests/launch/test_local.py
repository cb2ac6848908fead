"""launch/local.sh: two real processes, joined by jax.distributed over gloo, four devices each."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
from processes import (
    LOCAL,
    PATIENCE,
    ROOT,
    alive,
    environment,
    events,
    finish,
    kill_group,
    lines,
    local,
    logged,
    metrics,
    rank,
    run,
    started,
    wait_until,
)

from jaxmoe.forecast.__main__ import main as forecast

pytestmark = pytest.mark.multiprocess

ENDS_WITHIN = 15.0  # seconds: all processes, once one has failed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


class Broken:
    """Starts of a run that are ended from outside, and what was seen."""

    def __init__(self, folder: Path, text_cache: Path) -> None:
        self.run_dir, self.text_cache = folder / "run", text_cache
        self.ends: dict[str, tuple[int, float, str, list[int]]] = {}

    def end(
        self, run_dir: Path, ready: Callable[[], bool], send: Callable[[Popen], object]
    ) -> None:
        """Starts, waits until ready, sends a signal, and waits until nobody is left."""
        log = run_dir.parent / f"{send.__name__}.log"
        with started(local(2, run_dir), self.text_cache, log) as process:
            wait_until(process, ready, log)
            begin = time.monotonic()
            send(process)
            code = process.wait(timeout=PATIENCE)
            while (left := alive(process.pid)) and time.monotonic() < begin + ENDS_WITHIN:
                time.sleep(0.01)  # they are dead, and the kernel has yet to say so
            seconds = time.monotonic() - begin
        self.ends[send.__name__] = code, seconds, log.read_text(), left


def kill_rank_1(process: Popen) -> None:
    """Rank 0 hangs: it will not notice by itself that its peer is gone."""
    os.kill(rank(process, 0), signal.SIGSTOP)
    os.kill(rank(process, 1), signal.SIGKILL)


def test_a_request_before_training_ends_all_at_once_and_is_to_be_repeated(tmp_path: Path):
    """Four ranks that die by the signal in the same moment, as while they import."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exec python3 "$@"\nexec sleep 60\n')
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "LOGS": str(tmp_path / "logs")}
    with Popen([str(LOCAL), "4"], env=env, start_new_session=True, text=True) as process:
        while len(alive(process.pid)) < 5 or not (tmp_path / "logs" / "rank-3.log").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)  # until they sleep
        process.terminate()
        try:
            assert process.wait(timeout=20) == 75
        finally:
            kill_group(process)


def test_logs_of_earlier_starts_stay(tmp_path: Path):
    """Those of a crash are what somebody comes back for."""
    fake, logs = tmp_path / "python", tmp_path / "logs"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exec python3 "$@"\necho said >&2\n')
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "LOGS": str(logs)}
    for seed in (1, 2):
        subprocess.run([str(LOCAL), "2", "--set", f"seed={seed}"], env=env, check=True)
    text = (logs / "rank-1.log").read_text()
    began = r"\S+Z rank 1 of 2: jaxmoe.train --set seed="
    assert re.fullmatch(rf"{began}1\nsaid\n{began}2\nsaid\n", text), text
    assert (logs / "rank-0.log").read_text().count(" rank 0 of 2: ") == 2  # tee may be late


def press_ctrl_c(process: Popen) -> None:
    process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def broken(folder: Path, text_cache: Path) -> Broken:
    """The whole group is killed, and the run finished. Another one, joined and not yet compiled
    (which takes longest), is ended twice: by the death of a rank, and by Ctrl-C."""
    it = Broken(folder, text_cache)
    run_dir, other = it.run_dir, folder / "other"
    saved = (run_dir / "checkpoints" / "6").exists
    it.end(run_dir, lambda: logged(run_dir) >= 8 and saved(), kill_group)
    (folder / "stdout").write_text(finish(local(2, run_dir), text_cache))
    it.end(other, lambda: len(events(other, "start")) == 1, kill_rank_1)
    it.end(other, lambda: len(events(other, "start")) == 2, press_ctrl_c)
    return it


def test_losses_equal_one_processs_to_rounding(broken: Broken, straight: Path):
    """At every step, over two starts, on data=2 x expert=2 x model=2."""
    mine, theirs = metrics(broken.run_dir), metrics(straight)
    assert [row["step"] for row in mine] == list(range(1, 25))
    for name in ("train/nll", "train/loss", "train/lr", "tokens"):
        np.testing.assert_allclose(
            [row[name] for row in mine], [row[name] for row in theirs], rtol=1e-5, err_msg=name
        )


def test_two_processes_resume_by_themselves(broken: Broken, straight: Path):
    resumed = [row["step"] for row in events(broken.run_dir, "resume")]
    assert len(resumed) == 1
    assert resumed[0] in (6, 12)
    last = [lines(run / "evals.jsonl")[-1]["nll"] for run in (broken.run_dir, straight)]
    np.testing.assert_allclose(last[0], last[1], rtol=1e-5)
    assert forecast(["verify", str(broken.run_dir)]) == 0


def test_only_rank_0_writes(broken: Broken, folder: Path):
    """Each line of the record once, and the view on one process's stdout."""
    starts = len(events(broken.run_dir, "start")) + len(events(broken.run_dir, "resume"))
    assert starts == 2
    assert len(events(broken.run_dir, "done")) == 1
    shown = (folder / "stdout").read_text()
    assert shown.count("step 24/24") == 1
    assert "8 x cpu, 2 processes" in shown


def test_a_dead_rank_ends_all_with_a_message(broken: Broken):
    code, seconds, text, left = broken.ends["kill_rank_1"]
    assert code == 128 + signal.SIGKILL
    assert seconds < ENDS_WITHIN
    assert "rank 1 ended with exit code 137; all were ended" in text
    assert left == []


def test_one_ctrl_c_ends_all(broken: Broken):
    code, seconds, _, left = broken.ends["press_ctrl_c"]
    assert code == 130
    assert seconds < ENDS_WITHIN
    assert left == []


def test_kill_9_of_the_group_leaves_nobody(broken: Broken):
    code, _, _, left = broken.ends["kill_group"]
    assert code == -signal.SIGKILL
    assert left == []


def test_a_run_that_nobody_reads_any_more_ends_as_a_whole(tmp_path: Path, text_cache: Path):
    """As of `launch/local.sh 2 | head`: what cannot be written ends rank 0, and that the other."""
    command = local(2, tmp_path / "run", "--set", "train.steps=4000")
    own = {"env": environment(text_cache), "cwd": ROOT, "start_new_session": True, "text": True}
    process = Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **own)
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("step "):
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=2 * ENDS_WITHIN) not in (0, 75)
        end = time.monotonic() + ENDS_WITHIN
        while alive(process.pid):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        kill_group(process)


@pytest.mark.parametrize("bad", ["model.d_modle=3", "mesh.data=3"], ids=["config", "mesh"])
def test_a_users_mistake_is_told_once_and_exits_2(folder: Path, text_cache: Path, bad: str):
    """Whether it is seen before the processes have joined, or after."""
    run_dir = folder / "never"
    sets = ["--set", "mesh.emulate=4", "--set", bad]
    done = run(local(2, run_dir, *sets), text_cache)
    assert done.returncode == 2
    assert done.stderr.count("jaxmoe.train: ") == 1
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_the_number_of_processes_is_asked_for(text_cache: Path):
    done = run([*local(2, Path("nowhere"))[:1], "two"], text_cache)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not 'two'" in done.stderr


def test_sequences_spread_over_both_processes_give_the_same_losses(
    folder: Path, text_cache: Path, straight: Path
):
    """Keys travel from process to process; the batch is read whole by both."""
    run_dir = folder / "context"
    mesh = {"data": 1, "context": 4, "expert": 2, "model": 1}
    sets = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    sets += ["model.loss_chunk=3", "model.context_attention=ring"]
    finish(local(2, run_dir, *(word for text in sets for word in ("--set", text))), text_cache)
    names = "train/nll", "train/grad_norm"
    for name in names:
        mine, theirs = ([row[name] for row in metrics(run)] for run in (run_dir, straight))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, err_msg=name)
    last = [lines(run / "evals.jsonl")[-1]["nll"] for run in (run_dir, straight)]
    np.testing.assert_allclose(last[0], last[1], rtol=1e-5)
