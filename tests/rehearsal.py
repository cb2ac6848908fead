"""A run in this process, on some of its eight devices: what it leaves behind, and how it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from meshes import on
from processes import SMALL, events, lines, metrics

from jaxmoe.config import Config, FaultConfig, MeshConfig, load, replace
from jaxmoe.data.cache import prepare
from jaxmoe.run.bring import bring
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent


@dataclass(frozen=True)
class Rehearsed:
    folder: Path
    error: BaseException | None

    def events(self, what: str) -> list[dict[str, Any]]:
        return events(self.folder, what)

    def told(self, what: str) -> tuple[int, str]:
        """The step and the words of the only event of a kind."""
        (row,) = self.events(what)
        return row["step"], row["why"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return metrics(self.folder)

    @property
    def evals(self) -> list[dict[str, Any]]:
        return lines(self.folder / "evals.jsonl")


def rehearse(
    folder: Path,
    text_cache: Path,
    *faults: FaultConfig,
    axes: Mapping[str, int] | None = None,
    **parts: Any,
) -> Rehearsed:
    """A run of `small`, with faults; `parts`: of the config, instead of its own."""
    config = configured(text_cache, *faults, axes=axes, **parts)
    mesh = on(**(axes or {"data": 1}))
    bring(config, folder, "auto", lambda line: None)
    corpus = prepare(config.data, config.model.vocab_size)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh, corpus, folder, Silent(), math.inf)
        state, error = trainer.prepare(), None
        try:
            trainer.run(state)
        except Exception as raised:
            error = raised
    return Rehearsed(folder=folder, error=error)


def configured(
    text_cache: Path,
    *faults: FaultConfig,
    axes: Mapping[str, int] | None = None,
    **parts: Any,
) -> Config:
    config = load(str(SMALL))
    data = replace(config.data, cache=str(text_cache))
    own = {"data": data, "mesh": MeshConfig(**{"data": 1, **(axes or {})}), "faults": faults}
    return replace(config, **{**own, **parts})
