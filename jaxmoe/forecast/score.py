"""Scores of a register: every forecast against the outcome that came. Pure functions.

Errors and widths are fractions of the realised loss; pinball and CRPS are nats per token.

A register holds a few quantiles. Between two of them, and beyond the outermost, the predictive is
taken to be Gaussian: its quantiles lie on a line over the normal score of their level. So the
interval of 80 % is read from registers that hold q05 and q25 but no q10; where they do hold it,
theirs is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import LARGEST_LOSS, Floats
from jaxmoe.outside import finite

__all__ = ["BINS", "COVERAGES", "Score", "Summary", "score", "summarise"]

COVERAGES = (0.5, 0.8, 0.9)
# Shares of the run that were seen; the first is that of forecasts from before the start.
BINS = (0.0, 1e-9, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)
GRID = (np.arange(200) + 0.5) / 200  # levels that the CRPS and the PIT are summed over


@dataclass(frozen=True, kw_only=True)
class Score:
    """One forecast against its outcome."""

    index: int
    law: str
    cutoff_step: int
    target_step: int
    seen: float  # cutoff_tokens / target_tokens
    realised: float  # nats per token
    median: float  # nats per token
    quantiles: dict[str, float]  # as registered, nats per token
    error: float  # (median - realised) / realised; above 0: the run did better than forecast
    inside50: bool
    inside80: bool
    inside90: bool
    width50: float  # (q75 - q25) / realised
    width80: float
    width90: float
    pit: float  # probability that the forecast gave to at most the realised loss
    pinball: float  # mean over the registered quantiles
    crps: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores whose `seen` lies in [low, high). Forecasts of one run are not independent."""

    low: float
    high: float
    count: int
    runs: int
    error: float  # median, signed
    absolute_error: float  # median
    coverage50: float
    coverage80: float
    coverage90: float
    width50: float  # median
    width80: float  # median
    width90: float  # median
    pinball: float  # mean
    crps: float  # mean


def score(records: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Scores each forecast of a register's records, in order.

    Raises:
        UserError: no outcome yet, or a forecast of another target or held-out set.
    """
    outcomes = [r for r in records if r["kind"] == "outcome"]
    if not outcomes:
        raise UserError("no outcome in the register yet; score it when the run has ended")
    outcome = outcomes[-1]
    forecasts = [r for r in records if r["kind"] == "forecast"]
    for record in (outcome, *forecasts):
        if not all(finite(loss) and 0 < loss < LARGEST_LOSS for loss in record["loss"].values()):
            raise UserError(f"line {record['index'] + 1}: loss={record['loss']!r} is of no loss")
    for record in forecasts:
        for key in ("target_step", "set_fingerprint"):
            if record[key] != outcome[key]:
                raise UserError(
                    f"forecast {record['index']} has {key}={record[key]!r} and the outcome "
                    f"{outcome[key]!r}; they cannot be compared"
                )
    return [_score(record, float(outcome["loss"]["realised"])) for record in forecasts]


def summarise(
    scores: Sequence[Score], bins: Sequence[float] = BINS, *, runs: Sequence[str] | None = None
) -> list[Summary]:
    """Scores gathered by the share of the run that was seen; empty bins are left out.

    Args:
        runs: the run of each score; None: all are of one.
    """
    names = ["run"] * len(scores) if runs is None else list(runs)
    summaries = []
    for low, high in zip(bins[:-1], bins[1:], strict=True):
        chosen = [(s, n) for s, n in zip(scores, names, strict=True) if low <= s.seen < high]
        if chosen:
            summaries.append(_summary([s for s, _ in chosen], low, high, {n for _, n in chosen}))
    return summaries


def levels(names: Sequence[str]) -> dict[str, float]:
    """Levels of quantiles by name, rising: q05 is 0.05, median 0.5."""
    found = {name: 0.5 if name == "median" else float(name[1:]) / 100 for name in names}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def quantile(loss: Mapping[str, float], level: Floats) -> Floats:
    """Quantiles [k] of a predictive at `level` [k], straight in normal score between its own."""
    known = levels(list(loss))
    at = ndtri(np.array(list(known.values())))
    values = np.array([loss[name] for name in known], np.float64)
    z = ndtri(np.asarray(level, np.float64))
    slope = np.diff(values) / np.diff(at)
    piece = np.clip(np.searchsorted(at, z) - 1, 0, slope.size - 1)
    exact = np.isclose(z[:, None], at)  # a registered quantile is itself, to the last bit
    line = values[piece] + slope[piece] * (z - at[piece])
    return np.where(exact.any(1), values[exact.argmax(1)], line)


def _score(record: Mapping[str, Any], realised: float) -> Score:
    loss = {name: float(value) for name, value in record["loss"].items()}
    own = [_pinball(realised - loss[name], level) for name, level in levels(list(loss)).items()]
    drawn = quantile(loss, GRID)
    every = _pinball(realised - drawn, GRID)
    tail = np.array([(1 - share) / 2 for share in COVERAGES])
    low, high = quantile(loss, tail), quantile(loss, 1 - tail)
    inside = (low <= realised) & (realised <= high)
    width = (high - low) / realised
    return Score(
        index=record["index"],
        law=record["law"],
        cutoff_step=record["cutoff_step"],
        target_step=record["target_step"],
        seen=record["cutoff_tokens"] / record["target_tokens"],
        realised=realised,
        median=loss["median"],
        quantiles=loss,
        error=(loss["median"] - realised) / realised,
        inside50=bool(inside[0]),
        inside80=bool(inside[1]),
        inside90=bool(inside[2]),
        width50=float(width[0]),
        width80=float(width[1]),
        width90=float(width[2]),
        pit=float(np.mean(drawn < realised) + 0.5 * np.mean(drawn == realised)),
        pinball=float(np.mean(own)),
        # Laio and Tamea 2007, eq. 7: CRPS = 2 * integral over the level of the pinball loss.
        crps=float(2 * np.mean(every)),
    )


def _pinball(excess: Floats | float, level: Floats | float) -> Floats:
    return np.maximum(np.multiply(level, excess), np.multiply(np.subtract(level, 1), excess))


def _summary(scores: Sequence[Score], low: float, high: float, runs: set[str]) -> Summary:
    def median(name: str) -> float:
        return float(np.median([getattr(s, name) for s in scores]))

    def mean(name: str) -> float:
        return float(np.mean([getattr(s, name) for s in scores]))

    return Summary(
        low=low,
        high=high,
        count=len(scores),
        runs=len(runs),
        error=median("error"),
        absolute_error=float(np.median([abs(s.error) for s in scores])),
        coverage50=mean("inside50"),
        coverage80=mean("inside80"),
        coverage90=mean("inside90"),
        width50=median("width50"),
        width80=median("width80"),
        width90=median("width90"),
        pinball=mean("pinball"),
        crps=mean("crps"),
    )
