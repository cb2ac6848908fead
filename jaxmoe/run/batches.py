"""Where a run is in its data, and rows of tokens as a batch on the mesh."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.data.loader import Packed, Rows, documents
from jaxmoe.errors import UserError
from jaxmoe.run.step import Batch

__all__ = ["consumed", "milestones", "placed"]


def consumed(config: Config, folder: Path, step: int, meta: Mapping[str, Any]) -> int:
    """Tokens before a checkpoint of the run in `folder`, by its meta. Those of before there were
    ramps have sequences alone.

    Raises:
        UserError: by this config, that step begins elsewhere.
    """
    plan, sequences = curriculum(config), meta["position"]
    tokens = meta.get("tokens", sequences * config.train.seq_len)
    wanted = plan.tokens(step), plan.sequences(step)
    if (tokens, sequences) != wanted:
        raise UserError(
            f"{folder}: its checkpoint {step} was saved after {tokens} tokens in {sequences}"
            f" sequences, and by this config that step begins after {wanted[0]} in {wanted[1]};"
            " bring the config back, or give another --run-dir"
        )
    return tokens


def milestones(config: Config, there: Sequence[int] = ()) -> list[int]:
    """Steps of the checkpoints that checkpoint.keep_tokens keeps for good: of those that the plan
    makes, and of those that are `there`, by another plan perhaps."""
    tokens, every, plan = config.checkpoint.keep_tokens, config.checkpoint.every, curriculum(config)
    if not tokens:
        return []
    found = set()
    for steps in (range(every, config.train.steps + 1, every), sorted(there)):
        for before, step in pairwise((0, *steps)):
            if plan.tokens(step) // tokens > plan.tokens(before) // tokens:
                found.add(step)
    return sorted(found)


def placed(
    mesh: Mesh, shape: tuple[int, int], rows: Callable[[int, int], Any], eot: int | None
) -> Batch:
    """A batch of `shape` (sequences, tokens of each).

    Args:
        rows: Rows or Packed of the sequences start .. stop; asked only for those that this process
            holds.
        eot: what ends a document, where attention stays in one; None: it does not.
    """
    size, length = shape

    def whole(width: int, part: Callable[[Any], np.ndarray]) -> jax.Array:
        return mesh_lib.global_array(mesh, (size, width), lambda a, b: part(rows(a, b)))

    def numbers(r: Rows | Packed) -> np.ndarray:
        assert eot is not None
        if isinstance(r, Packed):
            return r.documents
        return documents(r.tokens[:, :-1], eot, r.weights)

    return Batch(
        tokens_BL=whole(length + 1, lambda r: r.tokens),
        weights_BL=whole(length, lambda r: r.weights),
        documents_BL=None if eot is None else whole(length, numbers),
    )
