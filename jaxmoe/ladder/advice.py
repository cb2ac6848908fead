"""What would decide an undecided gate: more seeds or further rungs, by expected posterior variance.

A Gaussian design tells its posterior variance before it is measured. The mean then moves by a
normal of the variance that is lost, so the chance of a verdict is a closed formula (a preposterior
analysis: Raiffa and Schlaifer 1961, chapter 5).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from jaxmoe.forecast.curve import Floats
from jaxmoe.ladder.gate import Gate

__all__ = ["Option", "options"]

SEEDS = (1, 2, 4, 8)
RUNGS = (1, 2)
EVEN = 0.5  # chance of a verdict from which on an option is worth naming first


@dataclass(frozen=True, kw_only=True)
class Option:
    """More runs, of both ladders.

    Attributes:
        what: in words.
        flops: that they cost.
        sd: of the log ratio at the target afterwards, expected; chance: of a verdict.
    """

    what: str
    flops: float
    sd: float
    chance: float


def options(gate: Gate, ratio: float = 1.0) -> list[Option]:
    """Those with even odds of a verdict, the cheapest first; then the others, the likeliest first.

    Args:
        ratio: compute of a candidate's run over the baseline's.
    """
    line, pair = gate.line, gate.flops * (1 + ratio)
    ones = np.ones_like(line.count)
    last = np.append(np.zeros(line.x.size - 1), 1.0) if line.x.size else ones
    order = np.argsort(line.x)
    largest = np.zeros_like(ones)
    largest[order] = last
    found = []
    for n in SEEDS:
        each = "1 more seed" if n == 1 else f"{n} more seeds"
        found.append(_option(gate, f"{each} at every rung", n * ones, np.zeros(0), n * pair.sum()))
        top = f"{each} at the largest rung"
        found.append(_option(gate, top, n * largest, np.zeros(0), n * float(pair @ largest)))
    steps = np.diff(np.sort(line.x))
    step = float(np.median(steps))
    seeds = float(np.median(line.count))
    for n in RUNGS:
        ahead: Floats = step * np.arange(1, n + 1, dtype=np.float64)
        each = "1 larger rung" if n == 1 else f"{n} larger rungs"
        cost = seeds * float(np.sum(pair.max() * np.exp(ahead)))
        what = f"{each} ({', '.join(f'{v:.3g}' for v in gate.flops.max() * np.exp(ahead))} FLOPs)"
        found.append(_option(gate, what, np.zeros_like(ones), ahead, cost, seeds))
    likely = sorted((o for o in found if o.chance >= EVEN), key=lambda o: o.flops)
    return likely + sorted((o for o in found if o.chance < EVEN), key=lambda o: -o.chance)


def _option(
    gate: Gate, what: str, more: Floats, rungs: Floats, flops: float, seeds: float = 1.0
) -> Option:
    line = gate.line
    top = np.log(gate.flops.max())
    ahead = float(np.log(gate.target) - top)
    mean, before = line.solve(line.x, line.count, line.steep, ahead, line.y)
    x = np.append(line.x, rungs)
    count = np.append(line.count + more, np.full(rungs.size, seeds))
    steep = np.concatenate([line.steep, gate.law.steep(rungs + top)], axis=1)
    _, after = line.solve(x, count, steep, ahead, None)
    middle = float(line.weight @ mean)
    between = float(line.weight @ (mean - middle) ** 2)
    lost = max(float(line.weight @ (before - after)), 1e-12)
    sd = float(np.sqrt(line.weight @ after + between))
    z = float(norm.ppf(gate.level)) * sd
    off = middle - float(np.log(gate.worth))
    moves = np.sqrt(lost)
    chance = float(norm.cdf((off - z) / moves) + norm.cdf((-off - z) / moves))
    return Option(what=what, flops=flops, sd=sd, chance=min(chance, 1.0))
