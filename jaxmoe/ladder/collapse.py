"""Do the curves of the rungs collapse onto one shape? One that does not is mis-tuned.

Over compute-optimal rungs of one recipe, loss curves fall onto one once both axes are normalised
(Qiu et al. 2025, arXiv:2507.02119, section 3). Here the remaining fall, y(f) = log(L(f) / L(1)) at
the shares f of a run's tokens, is a straight line in log compute over the rungs; each rung is
compared with the line of the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.forecast.curve import Floats

__all__ = ["Collapse", "collapse"]

SHARES = np.linspace(0.3, 0.9, 13)  # before, warm-up and transients rule
MIN_OTHERS = 4  # a line has two constants
FLOOR = 0.003  # of the loss: what evaluation and seeds alone give
LIMIT = 4.0  # sigmas


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Of one record: how far its curve is off the line of the others.

    Attributes:
        sigmas: root mean square over the shares, in units of the others' scatter; None: too few
            others, or no evals that early.
        deviation: mean of y(f) over that of the line: positive falls further in the end.
    """

    sigmas: float | None
    deviation: float

    @property
    def flagged(self) -> bool:
        return self.sigmas is not None and self.sigmas > LIMIT


def collapse(rows: Sequence[Mapping[str, Any]]) -> list[Collapse]:
    """One a record, in order."""
    falls = [_fall(row["curve"]) for row in rows]
    x = np.log([row["flops"] for row in rows])
    found = []
    for i, fall in enumerate(falls):
        others = [j for j in range(len(rows)) if j != i and falls[j] is not None]
        if fall is None or len({round(x[j], 3) for j in others}) < MIN_OTHERS:
            found.append(Collapse(sigmas=None, deviation=0.0))
            continue
        y = np.array([falls[j] for j in others])
        design = np.stack([np.ones(len(others)), x[others] - x[i]], 1)
        line, *_ = np.linalg.lstsq(design, y, rcond=None)
        free = max(1, len(others) - 2)
        scatter = np.sum((y - design @ line) ** 2, axis=0) / free
        leverage = float(np.linalg.inv(design.T @ design)[0, 0])
        spread = np.sqrt((FLOOR**2 + scatter.mean()) * (1 + leverage))
        off = fall - line[0]
        found.append(
            Collapse(sigmas=float(np.sqrt(np.mean(off**2)) / spread), deviation=float(off.mean()))
        )
    return found


def _fall(curve: Sequence[Sequence[float]]) -> Floats | None:
    """[shares] y(f), by interpolation in tokens; None where the evals begin too late."""
    if len(curve) < 3:
        return None
    tokens, loss = (np.array([row[n] for row in curve], np.float64) for n in (1, 2))
    share = tokens / tokens[-1]
    if share[0] > SHARES[0]:
        return None
    return np.interp(SHARES, share, np.log(loss)) - np.log(loss[-1])
