"""How each registered forecast did against the outcome."""

from dataclasses import dataclass

from jaxmoe.report.records import Forecast, Run

__all__ = ["Score", "score"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one forecast. The three judgements are None while there is no outcome."""

    forecast: Forecast
    share: float  # of the target's steps that had been trained when it was made
    error: float | None  # (median - outcome) / outcome
    inside_50: bool | None
    inside_90: bool | None


def score(run: Run) -> list[Score]:
    return [_one(forecast, run.outcome) for forecast in run.forecasts]


def _one(forecast: Forecast, outcome: float | None) -> Score:
    share = forecast.cutoff_step / forecast.target_step if forecast.target_step else 0.0
    loss = forecast.loss
    if outcome is None:
        return Score(forecast=forecast, share=share, error=None, inside_50=None, inside_90=None)
    return Score(
        forecast=forecast,
        share=share,
        error=(loss.median - outcome) / outcome if outcome else None,
        inside_50=loss.q25 <= outcome <= loss.q75,
        inside_90=loss.q05 <= outcome <= loss.q95,
    )
