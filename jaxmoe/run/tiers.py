"""Two places for checkpoints: a durable one, and a near one that is cheap and saved to more often.

What is near is lost with the machine: then the run goes on from the durable one before. It is kept
apart for each run directory, by a name that is drawn when that is first used, so that nothing of
another run is taken for it.
"""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe.config import CheckpointConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.outside import reading
from jaxmoe.run.checkpoint import Checkpoints, Restored
from jaxmoe.run.state import TrainState

__all__ = ["Tiers", "near_folder"]

NAME = "near.txt"  # in the run directory


def near_folder(run_dir: Path, config: CheckpointConfig) -> Path | None:
    """Where this run's near checkpoints are; None where it has none."""
    if config.near is None:
        return None
    file = run_dir / NAME
    if not file.exists():
        file.write_text(uuid.uuid4().hex + "\n")
    with reading(file):
        own = file.read_text().strip()
    if not re.fullmatch("[0-9a-f]{32}", own):  # it becomes a folder that is written and cleared
        raise UserError(f"{file}: {own!r:.80} is no name that was drawn for this run; remove it")
    return Path(config.near).expanduser().absolute() / own


class Tiers:
    """The checkpoints of a run, wherever they are; as one `Checkpoints`."""

    def __init__(self, durable: Checkpoints, near: Checkpoints | None) -> None:
        self._durable, self._near = durable, near
        self._both = [one for one in (near, durable) if one is not None]

    @classmethod
    def open(
        cls,
        folder: Path,
        config: CheckpointConfig,
        abstract: TrainState,
        milestones: list[int],
        near: Path | None,
    ) -> "Tiers":
        """Raises UserError where the near folder cannot be made."""
        durable = Checkpoints(folder, config, abstract, milestones)
        if near is None:
            return cls(durable, None)
        try:
            near.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"checkpoint.near={config.near}: {error.strerror}") from None
        newest = replace(config, keep=1, keep_best=0, at=())
        return cls(durable, Checkpoints(near, newest, abstract))

    def steps(self) -> list[int]:
        return sorted({step for one in self._both for step in one.steps()})

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], *, near: bool, **own: Any
    ) -> str | None:
        """As Checkpoints.save, into one of them."""
        place = self._near if near and self._near is not None else self._durable
        return place.save(step, state, meta, **own)

    def restore(
        self,
        abstract: TrainState,
        as_saved: Callable[[dict[str, Any]], TrainState] | None = None,
        last: int | None = None,
    ) -> Restored | None:
        """The newest whole one. The near one is asked first where it has a newer one."""
        broken: tuple[tuple[int, str], ...] = ()
        if self._near is not None:
            newest = [max(_upto(one, last), default=-1) for one in (self._near, self._durable)]
            if newest[0] > newest[1]:
                try:
                    restored = self._near.restore(abstract, as_saved, last)
                except UserError as error:
                    broken = ((newest[0], str(error)),)
                    self._near.forget(-1)
                else:
                    return restored
        restored = self._durable.restore(abstract, as_saved, last)
        if restored is None:
            return None
        return replace(restored, broken=(*broken, *restored.broken))

    def forget(self, last: int) -> None:
        for one in self._both:
            one.forget(last)

    def settle(self) -> str | None:
        problems = [problem for one in self._both if (problem := one.settle())]
        return "; ".join(problems) or None

    def close(self) -> str | None:
        """What went wrong with the last durable one; a near one that fails is no loss."""
        if self._near is not None:
            self._near.close()
        return self._durable.close()


def _upto(one: Checkpoints, last: int | None) -> list[int]:
    return [step for step in one.steps() if last is None or step <= last]
