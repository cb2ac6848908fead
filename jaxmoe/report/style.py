"""How several runs are told apart: dash, marker and colour, so that two of them are enough."""

from dataclasses import dataclass
from typing import Any

__all__ = ["LIMIT", "Style", "style"]

COLOURS = ("#1b5e9b", "#c2500a", "#1f2328", "#1d7f63", "#8a4fa3", "#8a929c")
DASHES = {"solid": "", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "14 4"}
# plotly's name and a path around (0, 0), for the legend of tables
SYMBOLS = {
    "circle": "M4 0A4 4 0 1 1 -4 0A4 4 0 1 1 4 0Z",
    "square": "M-4 -4H4V4H-4Z",
    "diamond": "M0 -5L5 0L0 5L-5 0Z",
    "triangle-down": "M-5 -3.5H5L0 5Z",
    "pentagon": "M0 -5L5 -1L3 5H-3L-5 -1Z",
    "hourglass": "M-4 -4H4L-4 4H4Z",
}
LIMIT = len(DASHES) * len(SYMBOLS)  # runs with a style of their own


@dataclass(frozen=True, kw_only=True)
class Style:
    colour: str
    dash: str
    symbol: str

    def line(self, width: float = 2) -> dict[str, Any]:
        return {"color": self.colour, "dash": self.dash, "width": width}

    def marker(self, size: float = 7) -> dict[str, Any]:
        """Light inside: where markers lie on each other, both outlines are seen."""
        edge = {"color": self.colour, "width": 1.5}
        return {"symbol": self.symbol, "size": size, "color": "#fff", "line": edge}

    def svg(self) -> str:
        """A piece of the line."""
        stroke = f'stroke="{self.colour}"'
        return (
            '<svg width="56" height="14" viewBox="0 0 56 14" aria-hidden="true">'
            f'<path d="M1 7H55" {stroke} stroke-width="2" stroke-dasharray="{DASHES[self.dash]}"/>'
            f'<path transform="translate(28 7)" d="{SYMBOLS[self.symbol]}" fill="#fff" {stroke} '
            'stroke-width="1.5"/></svg>'
        )


def style(place: int) -> Style:
    """Of the run at a place; no two of LIMIT share dash and marker: 5 and 6 are coprime."""
    return Style(
        colour=COLOURS[place % len(COLOURS)],
        dash=[*DASHES][place % len(DASHES)],
        symbol=[*SYMBOLS][place % len(SYMBOLS)],
    )
