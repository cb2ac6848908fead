"""Scores of a register: every forecast against the outcome that came. Pure functions.

Errors and widths are fractions of the realised loss; pinball and CRPS are nats per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.forecast.register import LEVELS

__all__ = ["Score", "Summary", "score", "summarise"]

# Each quantile stands for the levels nearest to it: the midpoint rule for the integral of Laio and
# Tamea 2007, eq. 7: CRPS = 2 * integral over q of the pinball loss.
CRPS_WEIGHTS = {"q05": 0.15, "q25": 0.225, "median": 0.25, "q75": 0.225, "q95": 0.15}
BINS = (0.0, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)


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
    error: float  # (median - realised) / realised; above 0: the run did better than forecast
    inside50: bool
    inside90: bool
    width50: float  # (q75 - q25) / realised
    width90: float  # (q95 - q05) / realised
    pinball: float  # mean over the five quantiles
    crps: float  # approximate, from the five quantiles


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores whose `seen` lies in [low, high)."""

    low: float
    high: float
    count: int
    error: float  # median, signed
    absolute_error: float  # median
    coverage50: float
    coverage90: float
    width50: float  # median
    width90: float  # median
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
    for record in forecasts:
        for key in ("target_step", "set_fingerprint"):
            if record[key] != outcome[key]:
                raise UserError(
                    f"forecast {record['index']} has {key}={record[key]!r} and the outcome "
                    f"{outcome[key]!r}; they cannot be compared"
                )
    return [_score(record, float(outcome["loss"]["realised"])) for record in forecasts]


def summarise(scores: Sequence[Score], bins: Sequence[float] = BINS) -> list[Summary]:
    """Scores gathered by the share of the run that was seen; empty bins are left out."""
    summaries = []
    for low, high in zip(bins[:-1], bins[1:], strict=True):
        chosen = [s for s in scores if low <= s.seen < high]
        if chosen:
            summaries.append(_summary(chosen, low, high))
    return summaries


def _score(record: Mapping[str, Any], realised: float) -> Score:
    loss = record["loss"]
    pinball = {name: _pinball(realised - loss[name], level) for name, level in LEVELS.items()}
    return Score(
        index=record["index"],
        law=record["law"],
        cutoff_step=record["cutoff_step"],
        target_step=record["target_step"],
        seen=record["cutoff_tokens"] / record["target_tokens"],
        realised=realised,
        median=loss["median"],
        error=(loss["median"] - realised) / realised,
        inside50=loss["q25"] <= realised <= loss["q75"],
        inside90=loss["q05"] <= realised <= loss["q95"],
        width50=(loss["q75"] - loss["q25"]) / realised,
        width90=(loss["q95"] - loss["q05"]) / realised,
        pinball=sum(pinball.values()) / len(pinball),
        crps=2 * sum(CRPS_WEIGHTS[name] * value for name, value in pinball.items()),
    )


def _pinball(excess: float, level: float) -> float:
    return max(level * excess, (level - 1) * excess)


def _summary(scores: Sequence[Score], low: float, high: float) -> Summary:
    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    return Summary(
        low=low,
        high=high,
        count=len(scores),
        error=median([s.error for s in scores]),
        absolute_error=median([abs(s.error) for s in scores]),
        coverage50=float(np.mean([s.inside50 for s in scores])),
        coverage90=float(np.mean([s.inside90 for s in scores])),
        width50=median([s.width50 for s in scores]),
        width90=median([s.width90 for s in scores]),
        crps=float(np.mean([s.crps for s in scores])),
    )
