"""Trains what is missing of a ladder, each point in a process of its own."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxmoe import config as config_lib
from jaxmoe import exits
from jaxmoe.errors import UserError
from jaxmoe.ladder import records
from jaxmoe.ladder.family import Family
from jaxmoe.ladder.points import RUNS, Point, branch_off, is_done
from jaxmoe.outside import loads
from jaxmoe.run import record

__all__ = ["ROOT", "Asked", "Outcome", "missing", "submit", "train_points"]

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.2  # seconds between looks at a process
BY_ITSELF = 3.0  # seconds that a process gets to end after the terminal's own Ctrl-C
ASKED = 30.0  # seconds that it gets when it is asked to; then it is killed: its state is on disk
TAIL = 4096  # bytes at the end of a file that hold its last lines


class Asked(Exception):
    """SIGUSR1: the process that trains has saved its state, and no other was begun."""


class View(Protocol):
    """What a person sees of it."""

    def note(self, text: str) -> None: ...

    def show(self, point: Point, step: int, loss: float | None) -> None: ...

    def done(self, point: Point) -> None: ...


@dataclass(kw_only=True)
class Outcome:
    """Names of points by what became of them; failures with the last line of their logs."""

    trained: list[str] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def missing(points: Sequence[Point], folder: Path, family: Family) -> list[Point]:
    """Those not recorded yet.

    Raises:
        UserError: what is there is of another recipe.
    """
    rows = records.read_records(folder) if (folder / records.RECORDS).exists() else []
    return [point for point in points if not is_done(point, folder, family, rows)]


def train_points(points: Sequence[Point], folder: Path, family: Family, view: View) -> Outcome:
    """One after another. A point that fails is noted and the next one begins; a KeyboardInterrupt
    ends the process that trains before it goes on to the caller.

    Raises:
        Asked: SIGUSR1, which schedulers send before a job's time is over.
    """
    todo = missing(points, folder, family)
    outcome = Outcome(recorded=[point.name for point in points if point not in todo])
    for point in points:
        if point not in todo:
            view.done(point)
    for point in todo:
        failed = point.trunk in outcome.failed
        problem = f"{point.trunk} failed" if failed else _train(point, folder, family, view)
        if problem is None:
            outcome.trained.append(point.name)
        else:
            outcome.failed[point.name] = problem
            view.note(f"{point.name}: {problem}; the others go on")
        view.done(point)
    return outcome


def _train(point: Point, folder: Path, family: Family, view: View) -> str | None:
    """Trains and records one point; what went wrong, or None."""
    run = folder / RUNS / point.name
    run.parent.mkdir(parents=True, exist_ok=True)
    with _alone(run, view) as lock:
        branched = point.trunk is not None and branch_off(point, folder)
        if point.trunk is not None and not branched:
            view.note(f"{point.name}: {point.trunk} kept no step {point.branch}; it runs alone")
        if record.finished(run) is None:
            view.note(f"{point.name}: {'goes on' if run.exists() else 'starts'}")
            code, log = _process(point, folder, lock, view)
            if code != 0:
                return f"exit code {code}: {_last_line(log)}"
        place = {
            "family": family.name,
            "rung": point.rung,
            "seed": point.seed,
            "branch_of": (point.trunk, point.branch) if branched else None,
        }
        row = records.make(folder, run, place, family.varies)
        records.append(folder, row)
    view.note(
        f"{point.name}: {row['loss']:.4f} nats per token after {row['tokens']:,} tokens,"
        f" {row['flops']:.3g} FLOPs"
    )
    return None


@contextmanager
def _alone(run: Path, view: View) -> Iterator[int]:
    """A lock that the training process inherits: if the ladder is killed and the process lives on,
    the next ladder waits for it instead of writing into the same folder."""
    lock = os.open(f"{run}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    view.note(f"{run.name}: another process trains it; waiting for it to end")
                told = True
                time.sleep(POLL)
        yield lock
    finally:
        os.close(lock)


def _process(point: Point, folder: Path, lock: int, view: View) -> tuple[int, Path]:
    """Exit code and log of `python -m jaxmoe.train` on the point's config."""
    configs, logs = folder / "configs", folder / "logs"
    for made in (configs, logs):
        made.mkdir(exist_ok=True)
    file, log = configs / f"{point.name}.json", logs / f"{point.name}.log"
    file.write_text(json.dumps({"config": config_lib.as_dict(point.config)}, indent=2) + "\n")
    run = folder / RUNS / point.name
    command = [sys.executable, "-m", "jaxmoe.train", "--config", str(file), "--run-dir", str(run)]
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [*command, "--resume", "auto"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(),
            pass_fds=(lock,),
        )
        asked = False

        def pass_on(number: int, _: object) -> None:
            nonlocal asked
            asked = True
            process.send_signal(number)

        before = signal.signal(signal.SIGUSR1, pass_on)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=POLL)
                    break
                view.show(point, *_progress(run))
        finally:
            signal.signal(signal.SIGUSR1, before)
            _end(process)
    # One that had not begun to train ends by the signal itself.
    if code == exits.REQUEUE or (asked and code == -signal.SIGUSR1):
        raise Asked(f"{point.name}: asked to end, its state is saved")
    return code, log


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing if it has ended. Ctrl-C on a terminal reaches it too, so it is asked only then."""
    for ask, seconds in ((None, BY_ITSELF), (signal.SIGINT, ASKED), (signal.SIGKILL, ASKED)):
        if process.poll() is not None:
            return
        if ask is not None:
            process.send_signal(ask)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def _environment() -> dict[str, str]:
    """With this very package, wherever the command was started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _progress(run: Path) -> tuple[int, float | None]:
    """The last logged step and its training loss."""
    try:
        with open(run / record.METRICS, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16 * TAIL))
            whole, _, _ = file.read().rpartition(b"\n")
        line: Mapping[str, Any] = loads(whole.rpartition(b"\n")[2])
        return line["step"], line["train/nll"]
    except (OSError, ValueError, KeyError, TypeError):  # it is looked at while it is written
        return 0, None


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1] if said else 'it said nothing'} ({log})"


def submit(template: str, jobs: Mapping[str, Sequence[str]], runs: Mapping[str, Path]) -> list[str]:
    """Hands each job's command to a scheduler; its answers.

    Args:
        template: a command line in which {name}, {run} and {command} stand for those of a job. It
            is cut into words first, so that {command} is always one word, quoted for a shell.
        runs: the directory of each job's run.

    Raises:
        UserError: no {command} in it, no such program, or it fails.
    """
    if "{command}" not in template:
        raise UserError(f"--submit {template!r}: it needs {{command}}, the job's own command")
    answers = []
    for name, command in jobs.items():
        words = [
            word.replace("{name}", name)
            .replace("{run}", str(runs[name]))
            .replace("{command}", shlex.join(command))
            for word in shlex.split(template)
        ]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--submit {words[0]}: {error.strerror}; is it on PATH?") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().replace("\n", " ")
            raise UserError(f"--submit {words[0]}: exit code {done.returncode}: {said[-300:]}")
        answers.append(done.stdout.strip())
    return answers
