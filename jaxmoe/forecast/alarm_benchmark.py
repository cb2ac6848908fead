"""How often the alarms cry wolf, and how soon they see a fault, on public curves.

A run is flagged if any slow alarm (shift or drift) is raised on its curve as it is. A fault is a
loss that is higher by 1 % from half of the run on; it is found if an alarm comes before 55 %. Runs
without an observation in between cannot be, and are counted apart.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmoe.forecast.alarms import Prior, ShiftWatch, beside, prior_of
from jaxmoe.forecast.benchmark_data import Curve
from jaxmoe.forecast.curve import Floats

FAULT, BEGINS, WITHIN = 1.01, 0.5, 0.05
SIBLINGS, LEAST = 8, 3


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Of a set: runs, the share that was flagged, and of `tried` faults the share found."""

    runs: int
    flagged: float
    tried: int
    found: float


def score_alarms(
    curves: Sequence[Curve],
    siblings_of: Callable[[Curve], Sequence[Curve]],
    done: Callable[[], object] = lambda: None,
) -> Mapping[str, Scored]:
    """By set. `siblings_of`: completed runs that a run is compared with; `done` after each."""
    results: dict[str, list[tuple[bool, bool | None]]] = defaultdict(list)
    for curve in curves:
        siblings = [(s.share, s.loss) for s in siblings_of(curve)]
        known = prior_of(siblings) if len(siblings) >= LEAST else None
        base = beside(siblings) if known else None
        flagged = _raised(curve, curve.loss, known, base, until=1.0) is not None
        found = None
        if np.any((curve.share >= BEGINS) & (curve.share <= BEGINS + WITHIN)):
            faulty = curve.loss * np.where(curve.share >= BEGINS, FAULT, 1.0)
            at = _raised(curve, faulty, known, base, until=BEGINS + WITHIN)
            found = at is not None and at >= BEGINS
        results[curve.set].append((flagged, found))
        done()
    return {name: _scored(rows) for name, rows in sorted(results.items())}


def earlier(curves: Iterable[Curve], families: frozenset[str]) -> Callable[[Curve], list[Curve]]:
    """Siblings of runs in these sets, whose names rise with time: the newest earlier ones of the
    same family, or, where there are too few, of the set."""
    in_time = sorted(curves, key=lambda c: c.name)

    def siblings(curve: Curve) -> list[Curve]:
        if curve.set not in families:
            return []
        before = [c for c in in_time if c.set == curve.set and c.name < curve.name]
        alike = [c for c in before if c.family == curve.family]
        return (alike if len(alike) >= LEAST else before)[-SIBLINGS:]

    return siblings


def _raised(
    curve: Curve,
    loss: Floats,
    known: Prior | None,
    base: Callable[[float], float] | None,
    until: float,
) -> float | None:
    """The share of the run at which the first alarm came."""
    total = curve.step[-1]
    baseline = None if base is None else lambda step: base(step / total)
    watch = ShiftWatch(len(loss), prior=known, baseline=baseline)
    for step, share, value in zip(curve.step, curve.share, loss, strict=True):
        if share > until:
            return None
        if watch.add(int(step), float(value))[1]:
            return float(share)
    return None


def _scored(rows: Sequence[tuple[bool, bool | None]]) -> Scored:
    tried = [found for _, found in rows if found is not None]
    return Scored(
        runs=len(rows),
        flagged=float(np.mean([flagged for flagged, _ in rows])),
        tried=len(tried),
        found=float(np.mean(tried)) if tried else float("nan"),
    )
