"""Starts real training processes, watches what they leave behind, and ends them by their ids."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "run" / "small.py"
LOCAL = ROOT / "launch" / "local.sh"
PATIENCE = 120.0  # seconds for what takes a few on a quiet machine

# Of a metrics line: what time decides, and not the computation.
TIMED = ("seconds", "perf/step_seconds", "perf/tokens_per_second", "perf/mfu", "perf/data_wait")


@dataclass(frozen=True)
class Killed:
    """A run that was killed several times: fixture of tests/run."""

    run_dir: Path  # finished in the end
    half: Path  # as a kill left it: checkpoints 6 and 12, steps logged beyond
    half_step: int  # the last one logged there
    screen: str  # what the last start drew on a terminal


def environment(text_cache: Path) -> dict[str, str]:
    """CPU devices only, and both caches of the suite: runs of one shape compile once."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(text_cache.parent / "xla-runs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAXMOE_CACHE": str(text_cache),
        "PYTHON": sys.executable,
        "COLUMNS": "160",
    }
    return {**os.environ, **own}


def train(run_dir: Path, *args: str, config: Path | str = SMALL) -> list[str]:
    """The command of a run."""
    module = [sys.executable, "-m", "jaxmoe.train"]
    return [*module, "--config", str(config), "--run-dir", str(run_dir), *args]


def local(processes: int, run_dir: Path, *args: str) -> list[str]:
    """The command of a run of several processes, 4 devices each."""
    mesh = ["--set", "mesh.expert=2", "--set", "mesh.model=2", "--set", "mesh.data=2"]
    own = ["--config", str(SMALL), "--run-dir", str(run_dir), *mesh, *args]
    return [str(LOCAL), str(processes), *own]


def run(
    command: Sequence[str], text_cache: Path, patience: float = 2 * PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; what takes longer is killed with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(text_cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=patience)
    except BaseException:
        kill_group(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def finish(command: Sequence[str], text_cache: Path, patience: float = 2 * PATIENCE) -> str:
    """Runs a command that must succeed; its stdout."""
    done = run(command, text_cache, patience)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def on_terminal(command: Sequence[str], text_cache: Path) -> tuple[int, str]:
    """Runs a command on a pseudo terminal of 160 columns; its exit code and all that it drew."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    env = {**environment(text_cache), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    drawn = bytearray()
    try:
        with suppress(OSError):  # EIO: the other end was closed
            while part := os.read(ours, 65536):
                drawn += part
        return process.wait(timeout=PATIENCE), drawn.decode()
    finally:
        os.close(ours)
        process.kill()


@contextmanager
def started(command: Sequence[str], text_cache: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process at the head of a group of its own, of which nothing survives the block."""
    with open(log, "a") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(text_cache),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 of everything that the process started, and of itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=PATIENCE)


def wait_until(process: subprocess.Popen[str], seen: Callable[[], bool], log: Path) -> None:
    """Returns as soon as `seen()`; fails if the process ends before, or nothing comes."""
    end = time.monotonic() + PATIENCE
    while not seen():
        if process.poll() is not None and not seen():
            pytest.fail(f"ended with {process.returncode} too early:\n{log.read_text()[-3000:]}")
        if time.monotonic() > end:
            pytest.fail(f"waited in vain:\n{log.read_text()[-3000:]}")
        time.sleep(0.0005)


def alive(group: int) -> list[int]:
    """Processes of a group that still run (not zombies)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def rank(process: subprocess.Popen[Any], number: int) -> int:
    """The id of a rank's process in the launcher's group."""
    for pid in alive(process.pid):
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if f"JAXMOE_PROCESS_ID={number}".encode() in environ and b"jaxmoe.train" in command:
            return pid
    raise AssertionError(f"no rank {number}")


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; [] where it is missing."""
    if not file.exists():
        return []
    whole, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What was computed at each logged step, without what time decides."""
    rows = lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def events(run_dir: Path, what: str) -> list[dict[str, Any]]:
    return [row for row in lines(run_dir / "events.jsonl") if row["what"] == what]


def logged(run_dir: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    rows = lines(run_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
