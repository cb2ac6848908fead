"""Forecasts of a run's final held-out loss: laws, fits, register, scores. numpy and scipy only."""

from jaxmoe.forecast.curve import Run, Schedule, until
from jaxmoe.forecast.hook_api import Forecast, PathPoint, Quantiles, forecast_final, ready
from jaxmoe.forecast.laws import Fit, Law, WithinRun

__all__ = [
    "Fit",
    "Forecast",
    "Law",
    "PathPoint",
    "Quantiles",
    "Run",
    "Schedule",
    "WithinRun",
    "forecast_final",
    "ready",
    "until",
]
