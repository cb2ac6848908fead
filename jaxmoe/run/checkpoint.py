"""Checkpoints by orbax: state, data position, forecast state and config, saved as one.

Saving is asynchronous and becomes visible by a rename, so a kill at any moment leaves the one
before. What cannot be restored is set aside, and the one before it is taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmoe.config import CheckpointConfig
from jaxmoe.run.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that came back, and those that did not: (step, error) each."""

    step: int
    state: TrainState
    meta: dict[str, Any]
    broken: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of a run, newest `keep` of them."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder.absolute()
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=("state", "meta"))

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Returns when the state is copied; writing goes on behind."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, onto the shardings of `abstract`; None if none is.

        Files are read back in full; any failure to do so counts as broken. A broken one is moved
        to `broken-STEP` beside the others, so that its step can be saved again.
        """
        broken = []
        for step in reversed(self.steps()):
            try:
                state, meta = self._restore(step, abstract)
            except Exception as error:  # whatever the storage layers raise
                reason = " ".join(str(error).split())[:300]
                broken.append((step, f"{type(error).__name__}: {reason}"))
                self._set_aside(step)
                continue
            return Restored(step=step, state=state, meta=meta, broken=tuple(broken))
        if broken:
            raise RuntimeError(f"no checkpoint in {self._folder} can be restored: {broken}")
        return None

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),  # pyright: ignore[reportCallIssue]
            meta=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
        )
        item = self._manager.restore(step, args=args)
        state, meta = item["state"], item["meta"]
        if int(state.step) != step or meta["step"] != step:
            raise ValueError(f"it says step {int(state.step)} and {meta['step']}, not {step}")
        return state, meta

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder.parent / f"broken-checkpoint-{step}")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager = self._open()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
