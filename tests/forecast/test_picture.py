"""The picture of scores: what is drawn where, black and white, and what it needs to be written."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forecast_cases import outcome, record
from scipy.special import ndtri

from jaxmoe.errors import UserError
from jaxmoe.forecast.picture import BANDS, check_picture, figure, write_picture
from jaxmoe.forecast.score import Score, score

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def scores_of(realised: float, *steps: int) -> list[Score]:
    """Forecasts N(3, 0.1) at these steps, and what came."""
    loss = {name: 3 + 0.1 * float(ndtri(q)) for name, q in QUANTILES.items()}
    lines = [*(record(step, loss=loss) for step in steps), outcome(realised)]
    return score([{**line, "index": i} for i, line in enumerate(lines)])


def named(drawn: dict[str, Any], name: str) -> dict[str, Any]:
    (trace,) = [t for t in drawn["data"] if t["name"] == name]
    return trace


def test_one_run_is_a_fan_about_its_outcome() -> None:
    drawn = figure([("runs/a<b", s) for s in scores_of(3.1, 800, 200, 400)])
    band = named(drawn, "90 %")
    assert band["fill"] == "toself"
    assert band["x"] == [20, 40, 80, 80, 40, 20]
    low, high = (100 * ((3 + 0.1 * z) / 3.1 - 1) for z in ndtri([0.05, 0.95]))
    assert band["y"] == pytest.approx([low] * 3 + [high] * 3)
    early, late = scores_of(3.1, 200), scores_of(6.2, 800)
    crossed = named(figure([("a", s) for s in (*late, *early)]), "90 %")["y"]
    assert crossed[0] > crossed[1] and crossed[3] > crossed[2]  # low, low, then high from the end
    median = named(drawn, "runs/a&lt;b")  # plotly reads HTML in names
    assert median["y"] == pytest.approx([100 * (3 / 3.1 - 1)] * 3)
    assert named(drawn, "outcome")["y"] == [0, 0]


def test_runs_are_bars_apart_with_marks_of_their_own() -> None:
    pairs = [(name, s) for name in ("a", "b", "c") for s in scores_of(3.0, 200, 600)]
    drawn = figure(pairs)
    bars = named(drawn, "80 %")
    assert len(bars["x"]) == 3 * len(pairs)
    assert bars["x"][2::3] == [None] * len(pairs)
    marks = [named(drawn, name) for name in "abc"]
    assert len({m["marker"]["symbol"] for m in marks}) == 3
    assert len({m["x"][0] for m in marks}) == 3
    assert np.mean([m["x"] for m in marks], axis=0) == pytest.approx([20, 60])


def test_calibration_counts_every_run_alike() -> None:
    """Twenty runs with outcomes at the forecast's own quantiles lie on the diagonal; of two runs,
    one with many forecasts weighs no more than one with few."""
    levels = (np.arange(20) + 0.5) / 20
    pairs = [
        (str(i), s)
        for i, q in enumerate(levels)
        for s in scores_of(3 + 0.1 * float(ndtri(q)), 200, 600)
    ]
    curve = named(figure(pairs), "these forecasts")
    assert np.max(np.abs(np.array(curve["y"]) - curve["x"])) <= 5.01
    many, few = scores_of(2.0, *range(100, 900, 100)), scores_of(4.0, 500)
    both = figure([*(("many", s) for s in many), *(("few", s) for s in few)])
    assert set(named(both, "these forecasts")["y"][1:-1]) == {50.0}
    assert "covered 0 / 0 / 0 % of 9" in both["layout"]["xaxis2"]["title"]["text"]


def test_bands_differ_in_lightness() -> None:
    shades = [[int(shade[i : i + 2], 16) for i in (1, 3, 5)] for _, _, shade, _, _ in BANDS]
    assert all(max(shade) == min(shade) for shade in shades)  # grey
    assert np.all(np.diff([shade[0] for shade in shades]) < -30)
    widths = [width for *_, width in BANDS]
    assert widths == sorted(set(widths))


def test_what_a_picture_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_picture(tmp_path / "a.html")
    with pytest.raises(UserError, match=r"pip install 'jaxmoe\[picture\]'"):
        check_picture(tmp_path / "a.svg")

    def fails(message: str) -> Any:
        def write(*_: Any, **__: Any) -> None:
            raise RuntimeError(message)

        return write

    pairs = [("a", s) for s in scores_of(3.0, 500)]
    monkeypatch.setattr("plotly.io.write_image", fails("Kaleido requires Google Chrome"))
    with pytest.raises(UserError, match="found no Chrome"):
        write_picture(tmp_path / "a.svg", pairs)
    monkeypatch.setattr("plotly.io.write_image", fails("disk"))
    with pytest.raises(RuntimeError, match="disk"):
        write_picture(tmp_path / "a.svg", pairs)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".svg", b"<svg"), pytest.param(".png", b"\x89PNG", marks=pytest.mark.slow)],
)
def test_pictures_are_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    missing = [name for name in ("kaleido",) if importlib.util.find_spec(name) is None]
    if shutil.which("chromium") is None and shutil.which("google-chrome") is None:
        missing.append("chromium")
    if missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"missing: {missing}")
        pytest.skip(f"missing: {missing}")
    pairs = [(name, s) for name in ("a", "b") for s in scores_of(3.0, 200, 600)]
    path = tmp_path / f"scores{suffix}"
    write_picture(path, pairs)
    assert path.read_bytes().startswith(start)
    if suffix == ".svg":
        assert "forecast over outcome, %" in path.read_text()
