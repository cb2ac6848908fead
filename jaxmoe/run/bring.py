"""Before a start: the newest whole copy of the run from its mirror (mirror.py), where the run
directory has no checkpoint that is as new.

A directory without a run gets the record as well, as it was when that copy was last sealed; what
came later comes again. One that holds the run keeps its own record, which is longer. A copy that is
not as it was written is told as an event `fallback`, and the one before is taken.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.run import record
from jaxmoe.run.copies import Broken, Copies, Unreachable
from jaxmoe.run.mirror import NAME, RECORD, identity
from jaxmoe.run.record import RunRecord
from jaxmoe.run.watching import told_to_all

__all__ = ["bring"]

TURN = 1.0  # seconds between the votes of processes that wait for process 0

Say = Callable[[str], None]


def bring(config: Config, run_dir: Path, resume: str, say: Say) -> None:
    """Called by all processes; process 0 looks, and brings what there is.

    Args:
        resume: as record.check_directory has it, of a run that may be at the mirror alone.
        say: a line to a person.

    Raises:
        UserError: the mirror cannot be asked and nothing is here to go on from; what is there is of
            another run, or none of it is whole; or `resume` forbids it.
    """
    if config.checkpoint.mirror is None:
        return
    if jax.process_count() == 1:
        _Bringing(config, run_dir, say).run(resume)
        return
    problem, work = None, None
    if jax.process_index() == 0:
        work = ThreadPoolExecutor(1).submit(_Bringing(config, run_dir, say).run, resume)
    while not told_to_all(work is None or bool(wait([work], TURN).done)):
        pass  # in short turns, since a collective has deadlines of its own
    if work is not None:
        problem = _problem(work)
    if problem := told_to_all(problem):
        raise UserError(problem)


def _problem(work: Future[None]) -> str | None:
    """Raises what is no UserError."""
    try:
        work.result()
    except UserError as error:
        return str(error)
    return None


class _Bringing:
    """By process 0."""

    def __init__(self, config: Config, run_dir: Path, say: Say) -> None:
        assert config.checkpoint.mirror is not None
        self._config, self._run_dir, self._say = config, run_dir, say
        self._copies = Copies(config.checkpoint.mirror)
        self._here = max(record.checkpoint_steps(run_dir), default=-1)
        self._record = RunRecord(run_dir, writes=True)

    def run(self, resume: str) -> None:
        place = self._copies.place
        try:
            self._run(resume)
        except Unreachable as error:
            if self._here < 0:
                raise UserError(
                    f"checkpoint.mirror={place}: {error}; nothing is in {self._run_dir} to go on"
                    " from without it: mend that, or leave it out"
                ) from None
            why = f"{place} cannot be asked for a newer checkpoint: {error}"
            self._tell("mirror-failed", self._here, why)
        except Broken as error:
            raise UserError(f"checkpoint.mirror={place}: {error}; bring it back") from None
        except OSError as error:
            raise UserError(f"{self._run_dir}: {error.strerror or error}; make room") from None
        finally:
            shutil.rmtree(self._run_dir / record.FETCHING, ignore_errors=True)

    def _run(self, resume: str) -> None:
        place, own = self._copies.place, identity(self._run_dir)
        owner, steps = self._copies.run(), self._copies.steps()
        if owner is None or not steps:
            self._copies.probe()
            if resume == "must" and not (self._run_dir / record.CONFIG).exists():
                raise UserError(
                    f"--resume must: {self._run_dir} holds no run, and {place} no copy of one"
                )
            return
        fresh = own is None and self._here < 0
        if own != owner["run"] and not fresh:
            raise UserError(
                f"checkpoint.mirror={place} holds copies of another run than {self._run_dir};"
                " give another checkpoint.mirror, or an empty --run-dir to go on with those"
            )
        if fresh and resume == "never":
            raise UserError(
                f"--resume never: {place} holds a run already; give another checkpoint.mirror"
            )
        self._check_recipe(owner)
        self._fetch([step for step in steps if step > self._here], fresh, owner["run"])

    def _check_recipe(self, owner: Mapping[str, Any]) -> None:
        theirs = config_lib.from_json(json.dumps(owner["config"]))
        if differences := record.forbidden(theirs, self._config):
            raise UserError(
                f"checkpoint.mirror={self._copies.place} holds a run of a different config"
                f" ({'; '.join(differences)}); give another checkpoint.mirror"
            )

    def _fetch(self, newer: list[int], fresh: bool, run: str) -> None:
        """The newest whole one of those."""
        broken: list[tuple[int, str]] = []
        for step in reversed(newer):
            try:
                self._say(f"checkpoint {step} comes from {self._copies.place}")
                got = self._get(step, fresh)
                break
            except Broken as error:
                broken.append((step, str(error)))
        else:
            step, got = None, None
        if got is None and self._here < 0:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in broken)
            raise UserError(
                f"no copy in {self._copies.place} is whole ({reasons}); bring one back, or give"
                " another checkpoint.mirror"
            )
        if step is not None and got is not None:
            self._place(step, got, fresh, run)
        for number, reason in broken:
            self._tell("fallback", number, f"the copy of checkpoint {number} is broken: {reason}")
            self._copies.unseal(number, broken=True)
        if step is not None:
            self._tell("fetched", step, f"checkpoint {step} is brought from {self._copies.place}")

    def _get(self, step: int, fresh: bool) -> Path:
        """Where its files are now. Raises Broken."""
        into = self._run_dir / record.FETCHING
        shutil.rmtree(into, ignore_errors=True)
        index = self._copies.index(step)
        try:
            self._copies.get(f"checkpoints/{step}/files/", index["files"], into / str(step))
            if fresh:
                beside = index["record"]
                known = {k: v for k, v in beside["files"].items() if k in RECORD}
                (into / "record").mkdir(parents=True)
                self._copies.get(f"{beside['folder']}/", known, into / "record")
        except (KeyError, TypeError, AttributeError) as error:
            raise Broken(f"whole/{step}.json is damaged: {error!r}") from None
        return into

    def _place(self, step: int, got: Path, fresh: bool, run: str) -> None:
        """The config first, by which a directory is a run's; whose copies it has gone on from once
        its record is there: a start after a kill does what is left."""
        if fresh:
            self._check_registers(got / "record")
            self._record.begin(self._config)
            for file in sorted((got / "record").iterdir()):
                os.replace(file, self._run_dir / file.name)
        checkpoints = self._run_dir / record.CHECKPOINTS
        checkpoints.mkdir(exist_ok=True)
        (self._run_dir / NAME).write_text(run + "\n")
        os.rename(got / str(step), checkpoints / str(step))

    def _check_registers(self, folder: Path) -> None:
        """What was registered here is never lost: it must be a part of what comes."""
        for file in record.REGISTERS:
            here = self._run_dir / file
            if here.exists() and (wrong := register.contains(folder / file, register.head(here))):
                raise UserError(
                    f"{here} is not the register that {self._copies.place} has: {wrong}; give"
                    " another --run-dir or checkpoint.mirror"
                )

    def _tell(self, what: str, step: int, why: str) -> None:
        self._record.event(what, step=step, why=why)
        self._say(f"{what}: {why}")
