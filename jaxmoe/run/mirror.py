"""A copy of the run elsewhere (`checkpoint.mirror`), for when its directory is lost (bring.py).

Behind the training a thread of process 0 copies each checkpoint that has become whole, and with it
the record of the run as it is then. The newest goes first; those that training leaves behind
meanwhile are passed over, unless they are kept for good. What fails is an event, and the next
checkpoint tries again. Layout and requests: copies.py.
"""

import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.run import faults, record, seal
from jaxmoe.run.batches import milestones
from jaxmoe.run.checkpoint import LOSS
from jaxmoe.run.copies import Broken, Copies, Stopped, Unreachable
from jaxmoe.run.goodput import GOODPUT
from jaxmoe.run.record import Tell
from jaxmoe.run.watching import told_to_all

__all__ = ["RECORD", "Mirror", "identity", "kept"]

NAME = "mirror.txt"  # in the run directory: which run's copies are its own
FOLDER = "mirroring"  # in the run directory: what is being copied
TICK = 0.5  # seconds between looks for a new checkpoint
WAIT = 1.0  # seconds between the votes of processes that wait for the last copy
LEAVE = 5.0  # seconds that a run which breaks off waits for a request that is under way

# What of the run directory goes along. What leans on others is before them, since lines are added
# meanwhile: an anchor may be behind its register, a forecast may not be ahead of its evals.
_ANCHORS = [str(file.with_suffix(".head.json")) for file in record.REGISTERS]
RECORD = (
    *(*_ANCHORS, *map(str, record.REGISTERS), record.EVALS, record.METRICS, record.LAYERS),
    *(faults.FILE, GOODPUT, record.EVENTS),
    *(record.ENVIRONMENT, record.SCHEDULE, record.TOKENIZER),
)


class Taken(Exception):
    """Somebody else writes to the same place; in one line."""


def identity(run_dir: Path) -> str | None:
    """Of the run whose copies are those of this directory; None: it never had any."""
    file = run_dir / NAME
    return file.read_text().strip() if file.exists() else None


def kept(config: Config, copies: Mapping[int, float | None], newest: int) -> set[int]:
    """Of checkpoints (step to held-out loss, where it is known) those that `checkpoint` keeps,
    with the `newest` so many."""
    own, steps = config.checkpoint, sorted(copies)
    best = sorted((loss, step) for step, loss in copies.items() if loss is not None)
    found = {*steps[-newest:], *own.at, *milestones(config, steps)}
    found |= {step for _, step in best[: own.keep_best]}
    return found & {*steps}


class Mirror:
    """Copies what comes while it is entered. All processes have one, and process 0 copies; without
    `checkpoint.mirror`, or without `writes`, nothing is done."""

    def __init__(self, config: Config, folder: Path, tell: Tell, *, writes: bool) -> None:
        """`tell`: of (what, step, why), an event."""
        place = config.checkpoint.mirror
        self._active = writes and place is not None
        self._deadline = config.health.save_deadline
        self._tell = tell
        self._in_order = False
        self._copier: _Copier | None = None
        if writes and place is not None and jax.process_index() == 0:
            self._copier = _Copier(config, place, folder, tell)

    def __enter__(self) -> "Mirror":
        if self._copier is not None:
            self._copier.start()
        return self

    def end_in_order(self) -> None:
        """All is saved, and what is left is worth waiting for."""
        self._in_order = True

    def __exit__(self, *_: object) -> None:
        """After `end_in_order` it waits for the last copy, health.save_deadline at the longest."""
        if self._in_order and self._active:
            self._wait()
        if self._copier is not None:
            self._copier.stop()

    def _wait(self) -> None:
        if self._copier is not None:
            self._copier.finish()
        until = time.monotonic() + self._deadline if self._deadline else None
        while True:
            late = until is not None and time.monotonic() > until
            done = self._copier is None or self._copier.done(WAIT)
            # Process 0 leads the others' connections: they wait for it in short turns.
            if told_to_all(done or late):
                break
        if self._copier is not None and not done:
            step = self._copier.step
            why = f"checkpoint {step} is not copied after {self._deadline:g} s; it is here alone"
            self._tell("mirror-failed", step, why)

    def forget(self, last: int) -> None:
        """Checkpoints of later steps count no more: what they hold has been rolled back."""
        if self._copier is not None:
            self._copier.forget(last)


class _Copier:
    """The thread of process 0."""

    def __init__(self, config: Config, place: str, folder: Path, tell: Tell) -> None:
        self._config, self._folder, self._tell = config, folder, tell
        self._stopped, self._finishing = threading.Event(), threading.Event()
        self._copies = Copies(place, self._stopped)
        self._lock = threading.Lock()  # of what is whole there
        self._there: dict[int, float | None] = {}  # step to held-out loss
        self._tried: set[int] = set()
        self._start: str | None = None  # drawn when the place is taken
        self.step = 0  # that is being copied, or was last
        self._forgotten: int | None = None  # the step that was being copied as it was rolled back
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """To end after what is left."""
        self._finishing.set()

    def done(self, seconds: float) -> bool:
        """Whether it has ended, at the latest after waiting so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """To end as soon as it can."""
        self._stopped.set()
        self._finishing.set()
        self._thread.join(LEAVE)

    def forget(self, last: int) -> None:
        if self._stopped.is_set():
            return
        with self._lock:
            if self.step > last:
                self._forgotten = self.step
            for step in [step for step in self._there if step > last]:
                del self._there[step]
                try:
                    self._copies.unseal(step)
                except (Unreachable, Stopped) as error:
                    why = f"checkpoint {step} is rolled back and its copy is still there: {error}"
                    self._tell("mirror-failed", step, why)

    def _work(self) -> None:
        try:
            self._loop()
        except Exception as error:  # of the run directory's file system
            why = f"nothing more is copied: {type(error).__name__}: {error}"
            self._tell("mirror-failed", self.step, why)

    def _loop(self) -> None:
        shutil.rmtree(self._folder / FOLDER, ignore_errors=True)  # what a kill left
        while not self._stopped.is_set():
            finishing = self._finishing.is_set()
            if (step := self._due()) is not None:
                self._tried.add(step)
                if self._guarded(step, self._copy, f"checkpoint {step} is not copied"):
                    self._guarded(step, self._delete_old, "older copies are not deleted")
            elif finishing:
                break
            else:
                self._finishing.wait(TICK)
        if not self._stopped.is_set() and (newest := max(self._here(), default=0)) in self._there:
            self._guarded(newest, self._seal, "the last events are not copied")

    def _guarded(self, step: int, work: Callable[[int], None], problem: str) -> bool:
        """Of a step; training does not end for what goes wrong here. Whether it is done."""
        try:
            if self._start is None:
                self._take()
            work(step)
            return True
        except Stopped:
            pass
        except Taken as error:
            self._tell("mirror-failed", step, str(error))
            self._stopped.set()
        except Exception as error:  # whatever the storage layers raise
            name = "" if isinstance(error, Unreachable) else f"{type(error).__name__}: "
            why = f"{problem}: {name}{' '.join(str(error).split())[:300]}"
            self._tell("mirror-failed", step, why)
        finally:
            shutil.rmtree(self._folder / FOLDER, ignore_errors=True)
        return False

    def _here(self) -> dict[int, float | None]:
        """Whole checkpoints of the run directory, and their held-out losses."""
        found = {}
        for step in record.checkpoint_steps(self._folder):
            folder = self._checkpoint(step)
            if (folder / seal.FILE).exists():
                found[step] = _loss(folder)
        return found

    def _checkpoint(self, step: int) -> Path:
        return self._folder / record.CHECKPOINTS / str(step)

    def _due(self) -> int | None:
        """What to copy next: the newest, or one that is kept for good."""
        here = self._here()
        if max(here, default=None) not in {None, *self._tried}:
            self._tried.clear()  # what failed is tried again with the next one
        wanted = kept(self._config, {**self._there, **here}, newest=1)
        left = (wanted & here.keys()) - self._there.keys() - self._tried
        return max(left, default=None)

    def _take(self) -> None:
        """The place is this start's from now on.

        Raises:
            Taken: another run's copies are there.
        """
        own = identity(self._folder)
        if own is None:
            own = uuid.uuid4().hex
            (self._folder / NAME).write_text(own + "\n")
        steps, there = self._copies.steps(), self._copies.run()
        if steps and (there is None or there["run"] != own):
            raise Taken(f"{self._copies.place} holds copies of another run")
        start = uuid.uuid4().hex
        owner = {"run": own, "start": start, "time": record.now()}
        self._copies.take({**owner, "config": config_lib.as_dict(self._config)})
        for step in steps:
            try:
                self._there[step] = self._copies.index(step).get("loss")
            except Broken:
                self._copies.unseal(step, broken=True)
        for step in self._copies.cut():
            self._copies.clear(step)
        self._start = start

    def _copy(self, step: int) -> None:
        if step in self._there:  # as was only seen when the place was taken
            return
        begin, source = time.perf_counter(), self._checkpoint(step)
        with self._lock:
            self.step = step
        self._copies.clear(step)
        try:
            with self._held(source) as held:
                names = {f.relative_to(held).as_posix(): f for f in held.rglob("*") if f.is_file()}
                files = self._copies.put(f"checkpoints/{step}/files/", names)
                sealed, loss = json.loads((held / seal.FILE).read_text()), _loss(held)
        except FileNotFoundError:
            if source.exists():
                raise
            return  # its time was over before it was copied; a newer one is there
        for name, sha256 in sealed.items():
            if files.get(name, {}).get("sha256") != sha256:
                raise ValueError(f"{name} is not as it was sealed")
        self._seal(step, {"step": step, "loss": loss, "files": files})
        size = sum(one["size"] for one in files.values())
        seconds = time.perf_counter() - begin
        why = (
            f"checkpoint {step} is at {self._copies.place}: {size / 1e6:.1f} MB in {seconds:.1f} s"
        )
        self._tell("mirrored", step, why)

    @contextmanager
    def _held(self, source: Path) -> Iterator[Path]:
        """The files of a checkpoint by names of our own, which stay when orbax deletes its own; or
        those of orbax, where the file system has no hard links."""
        held = self._folder / FOLDER / source.name
        try:
            shutil.copytree(source, held, copy_function=os.link)
        except OSError:
            shutil.rmtree(held, ignore_errors=True)
            yield source
        else:
            yield held
            shutil.rmtree(held)

    def _seal(self, step: int, index: Mapping[str, Any] | None = None) -> None:
        """Copies the record as it is now, and makes the checkpoint whole; or, without `index`,
        only refreshes the record beside it."""
        index = index or self._copies.index(step)
        before = index.get("record", {}).get("folder")
        folder = f"checkpoints/{step}/record-{1 + int(before.split('-')[-1]) if before else 1}"
        entries = self._copies.put(f"{folder}/", self._snapshot())
        with self._lock:
            if step == self._forgotten:
                raise Stopped
            there = self._copies.run()
            if there is None or there.get("start") != self._start:
                raise Taken(f"{self._copies.place} is written to by another start of this run")
            whole = {**index, "time": record.now(), "record": {"folder": folder, "files": entries}}
            self._copies.seal(step, whole)
            self._there[step] = index["loss"]
        if before:
            self._copies.delete(f"{before}/")

    def _snapshot(self) -> dict[str, Path]:
        """Of the record, in whole lines."""
        folder = self._folder / FOLDER / "record"
        folder.mkdir(parents=True, exist_ok=True)
        found = {}
        for name in RECORD:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, folder / name)
                found[name] = folder / name
                if name.endswith(".jsonl"):
                    _end_with_a_line(folder / name)
        return found

    def _delete_old(self, _: int) -> None:
        keep = kept(self._config, self._there, newest=self._config.checkpoint.keep)
        for step in sorted(self._there.keys() - keep):
            with self._lock:
                self._copies.unseal(step)
                self._there.pop(step, None)
            self._copies.clear(step)


def _loss(checkpoint: Path) -> float | None:
    """The held-out loss that orbax keeps beside it for checkpoint.keep_best."""
    try:
        loss = float(json.loads((checkpoint / "metrics" / "metrics").read_text())[LOSS])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None


def _end_with_a_line(file: Path) -> None:
    """Cuts off a last line without an end: it is still being written."""
    with open(file, "r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        back = 1 << 16
        while True:
            start = max(0, end - back)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0 or start == 0:
                break
            back *= 2
        stream.truncate(start + found + 1)
