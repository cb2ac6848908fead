"""What the figures share: palette, layout, lines, thinning. A figure is plotly's JSON, as dicts.

Every kind of mark differs in line style, marker or lightness as well as colour, so that the page
survives a black and white printer. Text that comes from a run passes `text` before plotly sees it:
plotly reads a subset of HTML in labels.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmoe.report.records import Row, number
from jaxmoe.report.words import big

__all__ = ["Figure", "axis", "envelope", "layout", "line", "points", "stacked", "text"]

INK, SOFT, GRID = "#1f2328", "#5b636d", "#e4e6ea"
BLUE, ORANGE, GREEN = "#1b5e9b", "#c2500a", "#1d7f63"  # apart in hue and, printed, in lightness
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}
LIMIT = 1600  # points of a line; more than the pixels it is drawn on

Trace = dict[str, Any]
Point = tuple[float, float, float | None]  # step, value, tokens


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure and what is under it. `extra` is what its controls switch between."""

    id: str
    title: str
    caption: str
    traces: list[Trace] = field(default_factory=list)  # none: there is only the sentence
    layout: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    table: list[list[str]] = field(default_factory=list)  # the first row is its head


def text(value: Any) -> str:
    return html.escape(str(value))


def points(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value, tokens) of the rows that have a finite value."""
    found = [(row["step"], number(row, key), number(row, "tokens")) for row in rows]
    return [(x, y, tokens) for x, y, tokens in found if y is not None]


def envelope(values: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """Thins a long line to the lowest and highest point of each bucket: spikes stay to be seen."""
    if len(values) <= limit:
        return list(values)
    width = -(-2 * len(values) // limit)
    kept: list[Point] = []
    for start in range(0, len(values), width):
        bucket = values[start : start + width]
        kept += sorted({min(bucket, key=_value), max(bucket, key=_value)}, key=_step)
    return kept if kept[-1] == values[-1] else [*kept, values[-1]]


def line(values: Sequence[Point], name: str, hover: str, **style: Any) -> Trace:
    """A line of (step, value, tokens). `hover` formats the value: '%{y:.3f} nats/token'."""
    kept = envelope(values)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [x for x, _, _ in kept],
        "y": [round_(y) for _, y, _ in kept],
        "customdata": [_tokens(tokens) for _, _, tokens in kept],
        "hovertemplate": f"{hover}<br>step %{{x:,}}%{{customdata}}<extra>{name}</extra>",
        **style,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13, "color": SOFT}},
        "gridcolor": GRID,
        "linecolor": SOFT,
        "ticks": "outside",
        "tickcolor": GRID,
        "zeroline": False,
        "automargin": True,
        **more,
    }


def layout(height: int, *, x: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
        "font": {"family": SANS, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": SOFT, "font": {"color": INK}},
        "legend": LEGEND,
        "modebar": {"bgcolor": "rgba(255,255,255,0.9)", "color": "#9aa1ab", "activecolor": INK},
        "xaxis": x,
        **more,
    }


def round_(value: float) -> float:
    """Six significant digits: what a figure can show, at half the bytes."""
    return float(f"{value:.6g}")


def stacked(count: int, gap: float = 0.08) -> list[list[float]]:
    """Domains of `count` panels above each other, the first on top."""
    height = (1 - gap * (count - 1)) / count
    tops = [1 - i * (height + gap) for i in range(count)]
    return [[max(0.0, top - height), top] for top in tops]


def _tokens(tokens: float | None) -> str:
    return "" if tokens is None else f", {big(tokens)} tokens"


def _value(point: Point) -> float:
    return point[1]


def _step(point: Point) -> float:
    return point[0]
