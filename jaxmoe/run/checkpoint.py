"""Checkpoints by orbax: state, data position, forecast state and config, saved as one.

Saving is asynchronous and becomes visible by a rename, so a kill at any moment leaves the one
before. What is not as it was sealed (seal.py) or cannot be restored is set aside once an earlier
one is found whole; as long as none is, nothing is touched.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxmoe.config import CheckpointConfig
from jaxmoe.errors import UserError
from jaxmoe.run import seal
from jaxmoe.run.ballot import Ballot, Outvoted
from jaxmoe.run.state import TrainState, relaid
from jaxmoe.run.writing import StateHandler, StateRestore, StateSave, cannot_write, own_bytes, said

ITEMS = ("state", "meta")
LOSS = "nll"
ANSWER = 60.0  # seconds that a process may take to say whether it can write


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that came back, and those that did not: (step, error) each."""

    step: int
    state: TrainState
    meta: dict[str, Any]
    broken: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of a run: the newest `keep` of them, the best, and those of the steps `at`
    and of `milestones`."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        abstract: TrainState,
        milestones: Sequence[int] = (),
    ) -> None:
        """`abstract`: shapes and shardings of what is saved."""
        self._folder = folder.absolute()
        self._config = config
        self._milestones = (*config.at, *milestones)
        self._saving = 0  # step
        self._unsaved: str | None = None  # what went wrong with it
        self._ballot = Ballot()
        self._handler = StateHandler(self._ballot, abstract)
        self._size = own_bytes(abstract)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        kept = [
            preservation_policy.LatestN(self._config.keep),
            preservation_policy.CustomSteps(self._milestones),
        ]
        if best := self._config.keep_best:
            policy = preservation_policy.BestN(
                get_metric_fn=_goodness, n=best, keep_checkpoints_without_metrics=False
            )
            kept.append(policy)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=_goodness if best else None,  # with it losses are kept beside states
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=self._ballot.barrier,
                post_finalization_callback=lambda: self._handler.heard(self._seal),
            ),
        )
        handlers = {"state": self._handler, "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def _seal(self) -> None:
        """Called when all files are written and their folder has not got its final name yet."""
        if jax.process_index() == 0:
            step = str(self._saving)
            folder = next(f for f in self._folder.iterdir() if f.name.partition(".")[0] == step)
            seal.write(folder, ITEMS)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        meta: dict[str, Any],
        loss: float = math.inf,
        *,
        disk_full: bool = False,
    ) -> str | None:
        """Returns when the state is copied; writing goes on behind.

        Args:
            loss: held-out, by which the best are kept.
            disk_full: rehearses a disk without room.

        Returns:
            What went wrong at once, or with the save before, if anything did; `settle` says what
            does later. Nothing of a save that failed is left, so that it takes no room. What fails
            on one of several processes fails on all.
        """
        args = ocp.args.Composite(
            state=StateSave(state),  # pyright: ignore[reportCallIssue]
            meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
        )
        problem = self.settle()
        self._saving, self._unsaved, self._handler.disk_full = step, None, disk_full
        self._ballot.begin()
        try:
            self._ballot.ready(cannot_write(self._folder, self._size), ANSWER)
        except Outvoted as error:
            return "; ".join(filter(None, (problem, self._not_saved(error))))
        try:
            metrics = {LOSS: loss} if self._config.keep_best else None
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as error:  # whatever the storage layers raise
            problem = "; ".join(filter(None, (problem, self._failed(error))))
        return problem

    def settle(self) -> str | None:
        """Waits for the save that was begun last; what went wrong with it."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return self._failed(error)
        return None

    def _failed(self, error: Exception) -> str:
        """Begins anew, which removes what was written of it."""
        self._ballot.fail(said(error))
        with suppress(Exception):  # it may say the same once more
            self._manager.close()
        self._manager = self._open()
        return self._not_saved(error)

    def _not_saved(self, error: Exception) -> str:
        why = str(error) if isinstance(error, Outvoted) else said(error)
        self._unsaved = f"checkpoint {self._saving} could not be saved: {why}"
        return self._unsaved

    def restore(
        self,
        abstract: TrainState,
        as_saved: Callable[[dict[str, Any]], TrainState] | None = None,
        last: int | None = None,
    ) -> Restored | None:
        """The newest whole checkpoint, in the shapes and shardings of `abstract`; None if there are
        none. `as_saved`: from a checkpoint's meta to its own shapes, where they may be others.
        `last`: none of a later step.

        The broken ones that are newer move to `broken-checkpoint-STEP` in the run's folder, so that
        their steps can be saved again.

        Raises:
            UserError: there are checkpoints, and all of them are broken.
        """
        broken = []
        for step in reversed([s for s in self.steps() if last is None or s <= last]):
            reason = self._broken_seal(step)
            if reason is None:
                try:
                    state, meta = self._restore(step, abstract, as_saved)
                except Exception as error:  # whatever the storage layers raise
                    reason = said(error)
                else:
                    self._set_aside([step for step, _ in broken])
                    return Restored(step=step, state=state, meta=meta, broken=tuple(broken))
            broken.append((step, reason))
        if broken:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in broken)
            raise UserError(
                f"no checkpoint in {self._folder} can be restored ({reasons}); bring one back, or"
                " give another --run-dir"
            )
        return None

    def _broken_seal(self, step: int) -> str | None:
        """As process 0 finds it, so that all processes go the same way."""
        reason = None
        if jax.process_index() == 0:
            reason = seal.problem(self._folder / str(step), ITEMS)
        if jax.process_count() > 1:
            found = multihost_utils.broadcast_one_to_all(np.int32(reason is not None))
            reason = reason or ("broken, as process 0 says" if found else None)
        return reason

    def _restore(
        self, step: int, abstract: TrainState, as_saved: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        of_meta = ocp.args.JsonRestore()  # pyright: ignore[reportCallIssue]
        item = self._manager.restore(step, args=ocp.args.Composite(meta=of_meta))
        meta = item["meta"]
        saved = abstract if as_saved is None else as_saved(meta)
        of_state = StateRestore(saved)  # pyright: ignore[reportCallIssue]
        item = self._manager.restore(step, args=ocp.args.Composite(state=of_state))
        state = item["state"] if saved is abstract else relaid(item["state"], abstract)
        if int(state.step) != step or meta["step"] != step:
            raise ValueError(f"it says step {int(state.step)} and {meta['step']}, not {step}")
        return state, meta

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                aside = self._folder.parent / f"broken-checkpoint-{step}"
                names = (aside, *(aside.with_name(f"{aside.name}-{n}") for n in range(2, 100)))
                (self._folder / str(step)).rename(next(n for n in names if not n.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("broken checkpoints are set aside")
        self._manager = self._open()

    def forget(self, last: int) -> None:
        """Deletes those of later steps: what they hold has been rolled back."""
        for step in self.steps():
            if step > last:
                self._manager.delete(step)

    def close(self) -> str | None:
        """Waits until everything is on disk; what went wrong with the last one."""
        problem = self.settle() or self._unsaved
        self._manager.close()
        return problem


def _goodness(metrics: Any) -> float:
    return -float(metrics[LOSS])
