"""What is forecast from what in `score --benchmark`: task definitions, and nothing of any law."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmoe.forecast.benchmark_data import Curve
from jaxmoe.forecast.curve import Run
from jaxmoe.forecast.points import MIN_BUDGETS, MIN_DECADES, Points

__all__ = [
    "ComputeTask",
    "RunTask",
    "across_compute",
    "by_size",
    "schedule_curves",
    "within_run",
]

EXCLUDED = ("clark_moe", "datablations")  # of the headline: a row of its own; repeated data
MAX_TARGETS = 12  # runs beyond the cut-off that coverage is measured on, spread over compute
BEYOND = 1.9  # a target has at least this times the compute of the largest run seen
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
WARMUP = 2160  # steps of multipowerlaw, from its repository
MAX_RUNS = 40  # of a set, evenly chosen, where each forecast takes a tenth of a second
LATEST = 0.6  # the last eval at most this share of the way before the cut-off, or it is skipped


@dataclass(frozen=True, kw_only=True, eq=False)
class ComputeTask:
    """Forecast `targets` (the last is the largest run) from `seen`."""

    set: str
    factor: float
    seen: Points
    targets: Points


@dataclass(frozen=True, kw_only=True, eq=False)
class RunTask:
    """Forecast the end of `curve` from what was known at `share` of it."""

    curve: Curve
    share: float
    siblings: tuple[Curve, ...]

    def target(self) -> Run:
        """The run as it was known at the cut-off."""
        return self.curve.run(until=self.share)


def across_compute(
    sets: Mapping[str, Points], factors: Sequence[float], *, excluded: Sequence[str] = EXCLUDED
) -> Iterator[ComputeTask]:
    """The largest runs of each set from those of at most 1 / factor of the largest's compute.

    A set with fewer than 4 budgets or under half a decade below the cut-off is left out.
    """
    for name, points in sets.items():
        if name in excluded:
            continue
        for factor in factors:
            seen = points.take(points.flops <= points.flops.max() / factor * 1.0001)
            if len(seen) == 0 or seen.budgets.size < MIN_BUDGETS:
                continue
            if np.log10(seen.flops.max() / seen.flops.min()) < MIN_DECADES:
                continue
            later = np.flatnonzero(points.flops > seen.flops.max() * BEYOND)
            later = later[np.argsort(points.flops[later], kind="stable")]
            if later.size > MAX_TARGETS:
                later = later[np.linspace(0, later.size - 1, MAX_TARGETS).round().astype(int)]
            yield ComputeTask(set=name, factor=factor, seen=seen, targets=points.take(later))


def by_size(points: Points) -> ComputeTask:
    """The runs of the largest size present, from those of at most a third of its parameters."""
    size = points.params_active
    seen = points.take(size <= size.max() / 3)
    return ComputeTask(
        set="clark_moe", factor=3.0, seen=seen, targets=points.take(size == size.max())
    )


def schedule_curves(curves: Sequence[Curve]) -> dict[float, tuple[list[Curve], list[Curve]]]:
    """For each size of multipowerlaw (in millions), the curves to fit and those to predict."""
    found = [c for c in curves if c.set == "multipowerlaw"]
    sizes = sorted({c.params_active for c in found})
    return {
        size: (
            [c for c in found if c.params_active == size and c.family in FITTED],
            [c for c in found if c.params_active == size and c.family not in FITTED],
        )
        for size in sizes
    }


def within_run(
    curves: Sequence[Curve], shares: Sequence[float], *, with_siblings: bool
) -> Iterator[RunTask]:
    """Runs at each cut-off; siblings are smaller runs of the same family, seen whole.

    Without siblings at most MAX_RUNS of a set are taken, evenly, and runs of under 9 evals are not.
    """
    families: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        families.setdefault((curve.set, curve.family), []).append(curve)
    chosen = curves if with_siblings else _spread(curves)
    for curve in chosen:
        smaller = tuple(
            c
            for c in families[curve.set, curve.family]
            if c.params_active < 0.999 * curve.params_active
        )
        if with_siblings and not smaller:
            continue
        for share in shares:
            seen = curve.share[curve.share <= share + 1e-9]
            if seen.size and seen[-1] >= LATEST * share:
                siblings = smaller if with_siblings else ()
                yield RunTask(curve=curve, share=share, siblings=siblings)


def _spread(curves: Sequence[Curve]) -> list[Curve]:
    kept: list[Curve] = []
    for name in dict.fromkeys(c.set for c in curves):
        members = [c for c in curves if c.set == name and c.loss.size >= 9]
        count = min(MAX_RUNS, len(members))
        places = np.unique(np.linspace(0, len(members) - 1, count).round().astype(int))
        kept += [members[i] for i in places]
    return kept
