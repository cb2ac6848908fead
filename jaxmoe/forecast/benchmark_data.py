"""Reads the public loss data of `score --benchmark`: points.csv and curves.csv.gz."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Floats, Run, Schedule
from jaxmoe.forecast.points import Points, read_points
from jaxmoe.outside import reading

__all__ = ["Curve", "load_curves", "load_points"]

GRID = 4096  # steps that the share of a run is told in: steps of the sources are of many kinds
DECAY = 0.4  # where the source gives no rate: constant, then linear to 0 over this share


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One run's curve. `share` [n] is of the run, rising to 1; `rate` [n] is relative or NaN."""

    set: str
    family: str
    name: str
    params_active: float
    step: Floats
    share: Floats
    rate: Floats
    loss: Floats

    @property
    def final(self) -> float:
        return float(self.loss[-1])

    def run(self, until: float = 1.0) -> Run:
        """On a grid of GRID steps, with the evals up to the share `until` and no other.

        The cut is made on the source's own shares, before the grid: it cannot look ahead.
        """
        grid = np.arange(1, GRID + 1) / GRID
        rate = self.rate
        if not np.isfinite(rate).all():
            rate = np.clip((1 - self.share) / DECAY, 0.0, 1.0)
        share = self.share
        if share[0] > 0.03 and rate[0] > 0.9:  # the warm-up is not in the data
            share, rate = np.r_[0.0, 0.01, share], np.r_[0.0, 1.0, rate]
        schedule = Schedule.of(np.maximum(np.interp(grid, share, rate), 1e-4))
        seen = self.share <= until + 1e-9
        steps = np.clip(np.ceil(self.share[seen] * GRID - 1e-6).astype(np.int64), 1, GRID)
        last = np.diff(steps, append=GRID + 1) > 0  # of several in one grid step, the last
        return Run(
            schedule=schedule,
            steps=steps[last],
            loss=self.loss[seen][last],
            params_active=self.params_active,
            name=self.name,
        )

    def exact(self, warmup: int) -> Run:
        """On its own steps, with a linear warm-up; a jump of the rate between evals is a jump."""
        last = int(self.step[-1])
        at = np.r_[0.0, warmup, self.step[self.step > warmup]]
        rate = np.r_[0.0, 1.0, self.rate[self.step > warmup]]
        for i in np.flatnonzero(np.abs(np.diff(rate)) > 0.2)[::-1]:
            if i > 0:
                middle = 0.5 * (at[i] + at[i + 1])
                at = np.insert(at, i + 1, [middle - 0.5, middle + 0.5])
                rate = np.insert(rate, i + 1, [rate[i], rate[i + 1]])
        lr = np.interp(np.arange(1, last + 1), at, rate)
        keep = self.step > warmup
        steps = self.step[keep].astype(np.int64)
        return Run(schedule=Schedule.of(lr), steps=steps, loss=self.loss[keep], name=self.name)


def load_points(folder: Path) -> dict[str, Points]:
    """Points of points.csv by set, in order of appearance."""
    path = folder / "points.csv"
    points = read_points([path])
    with reading(path), open(path, newline="") as file:
        names = np.array([row["set"] for row in csv.DictReader(file)])
    if names.size != len(points):
        raise UserError(f"{path}: {points.dropped} rows are incomplete; restore the file")
    return {name: points.take(names == name) for name in dict.fromkeys(names.tolist())}


def load_curves(folder: Path) -> list[Curve]:
    """Curves of curves.csv.gz in order of appearance; points not finite are dropped."""
    path = folder / "curves.csv.gz"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data names the folder that has it")
    rows: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    with reading(path):
        with gzip.open(path, "rt", newline="") as file:
            for row in csv.DictReader(file):
                rows.setdefault((row["set"], row["family"], row["run"]), []).append(row)
        return list(_curves(rows))


def _curves(rows: dict[tuple[str, str, str], list[dict[str, str]]]) -> Iterator[Curve]:
    for (name, family, run), found in rows.items():

        def column(key: str, found: list[dict[str, str]] = found) -> Floats:
            return np.array([float(row[key]) if row[key] else np.nan for row in found])

        loss, share = column("loss"), column("fraction")
        keep = np.isfinite(loss) & np.isfinite(share)
        keep &= np.r_[True, np.diff(share) > 0]
        if not keep.any():
            continue
        yield Curve(
            set=name,
            family=family,
            name=run,
            params_active=float(found[0]["params_active"]),
            step=column("step")[keep],
            share=share[keep],
            rate=column("lr_relative")[keep],
            loss=loss[keep],
        )
