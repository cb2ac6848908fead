"""What a ladder is to train: its points, which of them are done, and the branches of WSD runs.

Runs under a WSD schedule go alike until one of them decays. So a shorter run of a rung begins as a
copy of the long one as it was at that step (`checkpoint.at` keeps it), and only decays anew: the
same numbers as a run of its own (Haegele et al., arXiv:2405.18392, section 4).
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.config import Config, replace
from jaxmoe.errors import UserError
from jaxmoe.ladder import records
from jaxmoe.ladder.family import (
    Family,
    annealed_at,
    decay_start,
    differences,
    differing,
    recipe,
    recipe_fingerprint,
    shortened,
    tokens,
)
from jaxmoe.model.cost import cost
from jaxmoe.outside import json_object
from jaxmoe.run import record, seal
from jaxmoe.run.checkpoint import ITEMS

__all__ = ["Point", "branch_off", "is_done", "plan_points"]

RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a ladder.

    Attributes:
        name: of its folder in runs/.
        trunk: name of the run it branches off after `branch` steps; None: a run from the start.
        flops: that it costs, beyond its trunk.
    """

    name: str
    rung: int
    seed: int
    config: Config
    trunk: str | None
    branch: int
    flops: float


def plan_points(
    family: Family, rungs: Iterable[int], seeds: Sequence[int], shares: Sequence[float] = ()
) -> list[Point]:
    """All points, small rungs first, a trunk before its branches.

    Args:
        shares: of a rung's steps at which shorter, annealed runs end.

    Raises:
        UserError: a config breaks a rule, or its schedule does not branch there.
    """
    return [
        point
        for rung in rungs
        for seed in seeds
        for point in _of_rung(family.config(rung, seed), rung, seed, shares)
    ]


def _of_rung(config: Config, rung: int, seed: int, shares: Sequence[float]) -> list[Point]:
    name = f"rung-{rung:02}-seed-{seed}"
    *shorter, steps = annealed_at(config, shares)
    kept = tuple(sorted({decay_start(config, h) for h in shorter} | set(config.checkpoint.at)))
    trunk = replace(config, name=name, checkpoint=replace(config.checkpoint, at=kept))
    spent = records.flops(config, steps)
    found = [
        Point(name=name, rung=rung, seed=seed, config=trunk, trunk=None, branch=0, flops=spent)
    ]
    for horizon in shorter:
        at = decay_start(config, horizon)
        own = f"{name}-at-{horizon}"
        found.append(
            Point(
                name=own,
                rung=rung,
                seed=seed,
                config=replace(shortened(config, horizon), name=own),
                trunk=name,
                branch=at,
                flops=records.flops(config, horizon) - records.flops(config, at),
            )
        )
    return found


def is_done(point: Point, folder: Path, family: Family, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the point is recorded.

    Raises:
        UserError: its folder or its record is of another config; the differences are named.
    """
    run = folder / RUNS / point.name
    if (run / record.CONFIG).exists():
        found = differences(record.read_config(run), point.config)
        if found:
            raise UserError(
                f"{run} was trained by another recipe ({'; '.join(found)}); give another --out"
            )
    wanted = (family.name, point.rung, point.seed, tokens(point.config))
    row = next((row for row in rows if records.key(row) == wanted), None)
    if row is None:
        return False
    ours = recipe(point.config, family.varies)
    if row["recipe_fingerprint"] != recipe_fingerprint(ours):
        before = row.get("recipe", {})
        named = "; ".join(f"{k}: {x!r} -> {y!r}" for k, x, y in differing(before, ours))
        raise UserError(
            f"{folder}: rung {point.rung} is recorded by another recipe ({named}); give another"
            " --out"
        )
    sizes = cost(point.config.model, point.config.train.seq_len)
    if row["params_active"] != sizes.params_active:
        raise UserError(
            f"{folder}: rung {point.rung} is recorded with {row['params_active']:,} active"
            f" parameters and has {sizes.params_active:,} now; give another --out"
        )
    return True


def branch_off(point: Point, folder: Path) -> bool:
    """Makes the folder of a branch from its trunk, if it is not there; whether there was a state to
    branch off. It is whole or not there, also after a kill."""
    assert point.trunk is not None
    trunk, run = folder / RUNS / point.trunk, folder / RUNS / point.name
    saved = trunk / record.CHECKPOINTS / str(point.branch)
    if (run / record.CONFIG).exists():
        return any(e["what"] == "branch" for e in record.read_lines(run / record.EVENTS))
    if not saved.is_dir():
        return False
    part = run.with_name(f"{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    copy = part / record.CHECKPOINTS / str(point.branch)
    shutil.copytree(saved, copy, copy_function=_linked)
    _forget_register(copy)
    own = record.RunRecord(part, writes=True)
    own.begin(point.config)
    for name in (record.EVALS, record.METRICS):
        rows = [r for r in record.read_lines(trunk / name) if r["step"] <= point.branch]
        own.text(name, "".join(json.dumps(row) + "\n" for row in rows))
    why = f"off {point.trunk} at step {point.branch}"
    own.event("branch", step=point.branch or 0, why=why)
    part.rename(run)
    return True


def _forget_register(saved: Path) -> None:
    """The trunk's forecasts are of the trunk's end: a branch begins a register of its own."""
    file = saved / "meta" / "metadata"
    meta = json_object(file)
    if meta.get("register") is not None:
        for linked in (file, saved / seal.FILE):
            linked.unlink(missing_ok=True)  # the trunk's own stays as it is
        file.write_text(json.dumps({**meta, "register": None}))
        seal.write(saved, ITEMS)


def _linked(source: str, target: str) -> None:
    """Files of a checkpoint are never written again, so both runs may share them."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
