"""Fixtures of the forecast's tests."""

from pathlib import Path

import pytest
from forecast_cases import outcome, record

from jaxmoe.forecast.register import append


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A closed register of four forecasts and an outcome."""
    path = tmp_path / "forecasts.jsonl"
    for step in (200, 300, 400, 500):
        append(path, record(step))
    append(path, outcome())
    return path
