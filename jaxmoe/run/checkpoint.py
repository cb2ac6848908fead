"""Checkpoints by orbax: state, data position, forecast state and config, saved as one.

Saving is asynchronous and becomes visible by a rename, so a kill at any moment leaves the one
before. What is not as it was sealed (seal.py) or cannot be restored is set aside once an earlier
one is found whole; as long as none is, nothing is touched.
"""

from collections.abc import Callable
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
from jaxmoe.run.state import TrainState, relaid

ITEMS = ("state", "meta")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that came back, and those that did not: (step, error) each."""

    step: int
    state: TrainState
    meta: dict[str, Any]
    broken: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of a run: the newest `keep` of them, and those of the steps `at`."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder.absolute()
        self._config = config
        self._saving = 0  # step
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        kept = [
            preservation_policy.LatestN(self._config.keep),
            preservation_policy.CustomSteps(self._config.at),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def _seal(self) -> None:
        """Called when all files are written and their folder has not got its final name yet."""
        if jax.process_index() == 0:
            step = str(self._saving)
            folder = next(f for f in self._folder.iterdir() if f.name.partition(".")[0] == step)
            seal.write(folder, ITEMS)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Returns when the state is copied; writing goes on behind."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
        )
        self._manager.wait_until_finished()
        self._saving = step
        self._manager.save(step, args=args, force=True)

    def restore(
        self, abstract: TrainState, as_saved: Callable[[dict[str, Any]], TrainState] | None = None
    ) -> Restored | None:
        """The newest whole checkpoint, in the shapes and shardings of `abstract`; None if there are
        none. `as_saved`: from a checkpoint's meta to its own shapes, where they may be others.

        The broken ones that are newer move to `broken-checkpoint-STEP` in the run's folder, so that
        their steps can be saved again.

        Raises:
            UserError: there are checkpoints, and all of them are broken.
        """
        broken = []
        for step in reversed(self.steps()):
            reason = self._broken_seal(step)
            if reason is None:
                try:
                    state, meta = self._restore(step, abstract, as_saved)
                except Exception as error:  # whatever the storage layers raise
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
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
        of_state = ocp.args.StandardRestore(saved)  # pyright: ignore[reportCallIssue]
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

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
