"""Forecasts of a run's final held-out loss: laws, fits, register, scores. numpy and scipy only."""

from jaxmoe.forecast.curve import Run, Schedule, until
from jaxmoe.forecast.hook_api import Forecast, PathPoint, Quantiles, forecast_final, ready
from jaxmoe.forecast.laws import Fit, Law, WithinRun
from jaxmoe.forecast.moe_law import MoeStack
from jaxmoe.forecast.points import Points, read_points
from jaxmoe.forecast.siblings import SiblingLaw
from jaxmoe.forecast.stack import Stack

__all__ = [
    "Fit",
    "Forecast",
    "Law",
    "MoeStack",
    "PathPoint",
    "Points",
    "Quantiles",
    "Run",
    "Schedule",
    "SiblingLaw",
    "Stack",
    "WithinRun",
    "forecast_final",
    "read_points",
    "ready",
    "until",
]
