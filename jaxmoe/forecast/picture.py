"""The picture of `score RUN...`: forecasts against the outcome, and how well they are calibrated.

A figure is plotly's JSON, as in `jaxmoe.report`. Kinds of marks differ in lightness, width or dash,
never in hue alone, so it survives a black and white printer.
"""

import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from jaxmoe.errors import UserError
from jaxmoe.forecast.score import Score, quantile

__all__ = ["SUFFIXES", "check_picture", "figure", "write_picture"]

SUFFIXES = (".svg", ".png", ".html")
INK, SOFT, GRID = "#1f2328", "#5b636d", "#e4e6ea"
# Name, tail, shade of the fan, shade and width of the bars: each kind is told without its colour.
BANDS = (
    ("90 %", 0.05, "#e3e3e3", INK, 1),
    ("80 %", 0.1, "#bdbdbd", "#bdbdbd", 5),
    ("50 %", 0.25, "#7d7d7d", "#7d7d7d", 9),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "pentagon")
SIZE = {"width": 1100, "height": 480}
APART = 0.012  # of the run, between the bars of two runs
GRID_LEVELS = np.linspace(0, 1, 101)

Trace = dict[str, Any]


def check_picture(path: Path) -> None:
    """Raises UserError where `path` names no kind of picture that can be written here."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--picture {path}: end it in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: no such folder; create {path.parent}")
    if path.suffix != ".html" and importlib.util.find_spec("kaleido") is None:
        raise UserError(
            f"--picture {path}: {path.suffix} needs kaleido; pip install 'jaxmoe[picture]', or"
            " write .html"
        )


def write_picture(path: Path, scores: Sequence[tuple[str, Score]]) -> None:
    """Draws (run, score) pairs to an .svg, .png or .html file.

    Raises:
        UserError: there is no Chrome or Chromium to draw an .svg or .png with.
    """
    import plotly.io  # slow to import, and only this needs it

    drawn = figure(scores)
    if path.suffix == ".html":
        plotly.io.write_html(drawn, path, include_plotlyjs=True, validate=False, div_id="scores")
        return
    try:
        plotly.io.write_image(drawn, path, scale=2 if path.suffix == ".png" else 1, validate=False)
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise UserError(
            f"--picture {path}: found no Chrome or Chromium to draw with; install one, or write"
            " .html"
        ) from None


def figure(scores: Sequence[tuple[str, Score]]) -> dict[str, Any]:
    """Left: forecasts over the share of the run that was seen. Right: calibration."""
    runs: dict[str, list[Score]] = {}
    for name, one in sorted(scores, key=lambda pair: pair[1].seen):
        runs.setdefault(name, []).append(one)
    left = _fan(*runs.items()) if len(runs) == 1 and len(scores) > 1 else _bars(runs)
    return {
        "data": [*left, *_calibration(runs)],
        "layout": {
            **SIZE,
            "margin": {"l": 70, "r": 20, "t": 60, "b": 80},
            "font": {"family": "sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "#fff",
            "plot_bgcolor": "#fff",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": _axis("share of the run seen, %", domain=[0, 0.58], range=[-3, 103]),
            "yaxis": _axis("forecast over outcome, %"),
            "xaxis2": _axis(f"level, %<br>{_covered(scores)}", domain=[0.68, 1], anchor="y2"),
            "yaxis2": _axis("outcomes below it, %", range=[-2, 102], anchor="x2"),
        },
    }


def _axis(title: str, **more: Any) -> dict[str, Any]:
    style = {"gridcolor": GRID, "linecolor": SOFT, "ticks": "outside", "zeroline": False}
    return {"title": {"text": title}, **style, **more}


def _percent(one: Score, level: float) -> float:
    return 100 * (float(quantile(one.quantiles, np.array([level]))[0]) / one.realised - 1)


def _fan(run: tuple[str, list[Score]]) -> list[Trace]:
    """Nested bands of one run, the widest first, its medians and the outcome."""
    name, scores = run
    x = [100 * s.seen for s in scores]
    bands = [
        {
            "type": "scatter",
            "mode": "lines",
            "fill": "toself",
            "fillcolor": shade,
            "line": {"color": SOFT, "width": 0.5},
            "hoverinfo": "skip",
            "name": label,
            "x": x + x[::-1],
            "y": [_percent(s, tail) for s in scores]
            + [_percent(s, 1 - tail) for s in reversed(scores)],
        }
        for label, tail, shade, _, _ in BANDS
    ]
    return [*bands, _medians(name, x, scores, 0), _outcome()]


def _bars(runs: dict[str, list[Score]]) -> list[Trace]:
    """Upright bars, a little apart for each run; one broken line for each width."""
    shift = {name: 100 * APART * (i - (len(runs) - 1) / 2) for i, name in enumerate(runs)}
    placed = [(100 * s.seen + shift[name], s) for name, scores in runs.items() for s in scores]
    bars = [
        {
            "type": "scatter",
            "mode": "lines",
            "line": {"color": shade, "width": width},
            "hoverinfo": "skip",
            "name": label,
            "x": [v for x, _ in placed for v in (x, x, None)],
            "y": [v for _, s in placed for v in (_percent(s, tail), _percent(s, 1 - tail), None)],
        }
        for label, tail, _, shade, width in BANDS
    ]
    medians = [
        _medians(name, [100 * s.seen + shift[name] for s in scores], scores, i)
        for i, (name, scores) in enumerate(runs.items())
    ]
    return [*bars, _outcome(), *medians]


def _medians(name: str, x: list[float], scores: Sequence[Score], which: int) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(name),
        "marker": {
            "symbol": SYMBOLS[which % len(SYMBOLS)],
            "size": 8,
            "color": "#fff",
            "line": {"color": INK, "width": 1.5},
        },
        "x": x,
        "y": [100 * s.error for s in scores],
        "customdata": [[s.median, s.realised] for s in scores],
        "hovertemplate": "%{customdata[0]:.4f} forecast, %{customdata[1]:.4f} came<br>%{y:+.2f} %",
    }


def _outcome() -> Trace:
    line = {"color": INK, "width": 2, "dash": "dash"}
    return {"type": "scatter", "mode": "lines", "name": "outcome", "line": line} | {
        "x": [0, 100],
        "y": [0, 0],
    }


def _calibration(runs: dict[str, list[Score]]) -> list[Trace]:
    """Share of outcomes below each level, every run weighing the same, and what chance allows."""
    below = np.mean(
        [[np.mean([s.pit <= q for s in scores]) for q in GRID_LEVELS] for scores in runs.values()],
        axis=0,
    )
    # Forecasts of one run share its outcome, so chance is that of as many draws as there are runs.
    low, high = (binom.ppf(q, len(runs), GRID_LEVELS) / len(runs) for q in (0.05, 0.95))
    x = (100 * GRID_LEVELS).tolist()
    common: Trace = {"type": "scatter", "mode": "lines", "xaxis": "x2", "yaxis": "y2"}
    chance = {"name": f"90 % of chance, {len(runs)} independent", "fill": "toself"}
    return [
        {
            **common,
            **chance,
            "fillcolor": "#ededed",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "x": x + x[::-1],
            "y": (100 * low).tolist() + (100 * high[::-1]).tolist(),
        },
        {
            **common,
            "name": "calibrated",
            "line": {"color": SOFT, "width": 1, "dash": "dot"},
            "x": [0, 100],
            "y": [0, 100],
        },
        {
            **common,
            "name": "these forecasts",
            "line": {"color": INK, "width": 2.5, "shape": "hv"},
            "x": x,
            "y": (100 * below).tolist(),
        },
    ]


def _covered(scores: Sequence[tuple[str, Score]]) -> str:
    each = [(s.inside50, s.inside80, s.inside90) for _, s in scores]
    shares = " / ".join(f"{share:.0f}" for share in 100 * np.mean(each, axis=0))
    return f"50 / 80 / 90 % covered {shares} % of {len(each)}"
