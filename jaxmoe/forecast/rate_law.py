"""Where a sweep's loss is lowest, and how that moves with size: laws of the rate or the batch.

Per size a parabola in the log of what was swept, through the points around the lowest (as DeepSeek,
arXiv:2401.02954, section 3, and Bergsma et al., arXiv:2505.13738, have power laws of optima); over
sizes a power law. Intervals come from refits of losses drawn anew around the parabolas, with the
noise that the points of all sizes show around them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.outside import loads, reading

__all__ = ["Optimum", "PowerLaw", "fit_optima", "fit_power_law", "read_sweep"]

REACH = 2.1  # points so many octaves around the lowest are fitted
DRAWS = 1000
LEAST_NOISE = 1e-4  # of a loss, relative: what three points on a parabola do not show


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """value = scale * (size / at) ^ power; each with the ends of its 90 % interval."""

    scale: float
    power: float
    at: float  # geometric mean of the sizes
    scale_interval: tuple[float, float]
    power_interval: tuple[float, float]

    def __call__(self, size: float) -> float:
        return self.scale * (size / self.at) ** self.power


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Of one size. `value` is what was swept, at the lowest loss of the parabola; `draws` those of
    the refits, in which `interval` has 90 %."""

    size: float
    value: float
    loss: float
    interval: tuple[float, float]
    inside: bool  # of what was swept; else the optimum is a bound
    draws: np.ndarray


def read_sweep(path: Path, size: str, swept: str = "lr", loss: str = "loss") -> Mapping[float, Any]:
    """size -> [(swept, loss), ...] of a file of JSON lines, runs that diverged left out.

    Raises:
        UserError: no such file, or a line that is no JSON or lacks a key.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; benchmarks/transfer.py writes one")
    found: dict[float, list[tuple[float, float]]] = {}
    with reading(path):
        text = path.read_text()
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = loads(row)
            point = (float(line[size]), float(line[swept]), float(line[loss]))
            if not (point[0] > 0 and point[1] > 0):
                raise ValueError(f"{size}={point[0]:g}, {swept}={point[1]:g}: give sizes above 0")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
        if all(map(math.isfinite, point)):
            found.setdefault(point[0], []).append(point[1:])
    if not found:
        raise UserError(f"{path}: no run with a finite loss in it")
    return found


def fit_optima(sweep: Mapping[float, Any], *, seed: int = 0) -> list[Optimum]:
    """The optimum of each size, smallest first.

    Raises:
        UserError: a size with fewer than three values near its lowest loss.
    """
    rng = np.random.default_rng(seed)
    near = [(size, *_near(size, np.asarray(sweep[size], float))) for size in sorted(sweep)]
    residuals = [y - np.polyval(np.polyfit(x, y, 2), x) for _, x, y in near]
    # Of one family: a size alone has two points to spare, and knows its noise badly.
    spare = sum(len(x) - 3 for _, x, _ in near)
    squares = sum(float((r**2).sum()) for r in residuals)
    least = LEAST_NOISE * float(np.mean([y.mean() for _, _, y in near]))
    noise = max(math.sqrt(squares / spare) if spare else 0.0, least)
    # Student's t: the noise is an estimate, too.
    wide = noise * np.sqrt(spare / rng.chisquare(spare, DRAWS)) if spare else np.full(DRAWS, noise)
    return [_optimum(size, x, y, wide, rng) for size, x, y in near]


def fit_power_law(optima: Sequence[Optimum]) -> PowerLaw:
    """Of the optima that are inside of what was swept, on log scales, each refit with its own.

    Raises:
        UserError: fewer than two sizes have one.
    """
    inside = [o for o in optima if o.inside]
    if len(inside) < 2:
        raise UserError(
            f"{len(inside)} of {len(optima)} sizes have their optimum inside of what was swept; a"
            " law needs two: sweep a wider grid"
        )
    x = np.log([o.size for o in inside])
    at = float(x.mean())
    # Sizes that are known better count more.
    weight = 1 / np.maximum([np.log(o.draws).std() for o in inside], 0.02)

    values = np.log(np.stack([np.append(o.value, o.draws) for o in inside]))
    powers, scales = np.polyfit(x - at, values, 1, w=weight)  # the first is the fit, the rest draws
    low, high = np.quantile([scales[1:], powers[1:]], [0.05, 0.95], axis=1)
    scale, power = float(scales[0]), float(powers[0])
    return PowerLaw(
        scale=math.exp(scale),
        power=power,
        at=math.exp(at),
        scale_interval=(math.exp(low[0]), math.exp(high[0])),
        power_interval=(float(low[1]), float(high[1])),
    )


def _near(size: float, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those around the lowest: log2 of what was swept, and losses."""
    x, y = np.log2(points[:, 0]), points[:, 1]
    values = np.unique(x)
    means = np.array([y[x == v].mean() for v in values])
    near = np.abs(x - values[means.argmin()]) <= REACH
    if len(np.unique(x[near])) < 3:
        found = len(np.unique(x[near]))
        raise UserError(f"size {size:g}: {found} values near the lowest loss; give 3")
    return x[near], y[near]


def _optimum(
    size: float, x: np.ndarray, y: np.ndarray, noise: np.ndarray, rng: np.random.Generator
) -> Optimum:
    at = float(x.mean())
    curve = np.polyfit(x - at, y, 2)
    drawn = np.polyval(curve, x - at)[:, None] + noise * rng.standard_normal((len(x), len(noise)))
    ends = float(x.min() - at), float(x.max() - at)
    draws = np.array([_lowest(each, ends) for each in np.polyfit(x - at, drawn, 2).T])
    best = _lowest(curve, ends)
    low, high = np.quantile(draws, [0.05, 0.95])
    return Optimum(
        size=size,
        value=2 ** (best + at),
        loss=float(np.polyval(curve, best)),
        interval=(2 ** float(low + at), 2 ** float(high + at)),
        inside=bool(curve[0] > 0 and ends[0] < best < ends[1]),
        draws=2 ** (draws + at),
    )


def _lowest(curve: np.ndarray, ends: tuple[float, float]) -> float:
    """Of a parabola between the ends; a bound where it is not convex or falls all the way."""
    if curve[0] <= 0:
        return min(ends, key=lambda end: float(np.polyval(curve, end)))
    return float(np.clip(-curve[1] / (2 * curve[0]), *ends))
