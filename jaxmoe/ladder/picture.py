"""A ladder as one SVG: loss over compute, the law with its 90 % band, and runs that were forecast.

Written by hand, since a README shows SVG as it is and no library of ours writes it without a
browser. Text is escaped; there is no script in it.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.points import Points
from jaxmoe.ladder.fit import LEVELS, Analysis, line_of_sizes
from jaxmoe.ladder.targets import Forecasted

__all__ = ["along", "draw"]

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 55
STEPS = 80  # of the law's line
INK, SOFT, GRID, BLUE, ORANGE = "#1f2328", "#5b636d", "#e4e6ea", "#1b5e9b", "#c2500a"


def draw(found: Analysis) -> str:
    """SVG text. The law is drawn along the ladder's own line of sizes, and only without experts
    that vary: there is no single line then."""
    points = found.ladder.points
    end = found.optimum.flops if found.optimum else 3 * float(points.flops.max())
    end = max(end, *points.flops, *(t.flops for t in found.targets))
    x = np.linspace(np.log(points.flops.min()), np.log(end), STEPS)
    band = None if found.joint else found.fit.mixture(along(points, np.exp(x))).quantile(LEVELS)
    marks = [v for t in found.targets for v in (t.loss.q05, t.loss.q95, t.realised) if v]
    losses = np.concatenate([points.loss, marks, [] if band is None else band.ravel()])
    frame = _Frame(x[[0, -1]], losses)
    parts = [*frame.grid()]
    if band is not None:
        low, middle, high = band
        edge = [*zip(x, low, strict=True), *zip(x[::-1], high[::-1], strict=True)]
        parts.append(f'<polygon points="{frame.path(edge)}" fill="{BLUE}" fill-opacity="0.15"/>')
        line = frame.path(zip(x, middle, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>')
    for flops, loss, row in zip(points.flops, points.loss, found.ladder.rows, strict=True):
        at = frame.path([(np.log(flops), loss)]).split(",")
        said = f"rung {row['rung']}, seed {row['seed']}: {loss:.4f} at {flops:.3g} FLOPs"
        parts.append(
            f'<circle cx="{at[0]}" cy="{at[1]}" r="4" fill="{ORANGE}">'
            f"<title>{escape(said)}</title></circle>"
        )
    for target in found.targets:
        parts += _target(frame, target)
    title = f"{len(points)} runs: held-out loss over compute"
    if band is not None:
        title += ", law and 90 % interval"
    parts.append(_text(LEFT, 24, title, size=15))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' font-family="sans-serif" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _target(frame: "_Frame", t: Forecasted) -> list[str]:
    """The registered interval as a bar, the median across it, and what came as a diamond."""
    at = lambda loss: [float(v) for v in frame.path([(np.log(t.flops), loss)]).split(",")]  # noqa: E731
    x, low = at(t.loss.q05)
    (_, middle), (_, high) = at(t.loss.median), at(t.loss.q95)
    said = f"{t.name}: {t.loss.median:.4f}, {t.loss.q05:.4f} to {t.loss.q95:.4f}"
    if t.realised is not None:
        said += f"; came out at {t.realised:.4f}, off by {t.error:+.2%}"
    bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} {high:.1f}h12"
    bar += f"M{x - 6:.1f} {middle:.1f}h12"
    title = f"<title>{escape(said)}</title>"
    parts = [f'<path d="{bar}" fill="none" stroke="{INK}" stroke-width="2">{title}</path>']
    if t.realised is not None:
        _, y = at(t.realised)
        shape = f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"
        parts.append(f'<path d="{shape}" fill="{ORANGE}" stroke="{INK}">{title}</path>')
    parts.append(_text(x - 12, low + 4, t.name, anchor="end"))
    return parts


def along(points: Points, flops: Floats) -> Points:
    """The ladder's own line of sizes: a run at each compute [k]."""
    sizes = np.array([line_of_sizes(points, c) for c in flops])
    top = int(np.argmax(points.flops))
    each = points.flops[top] / (points.params_active[top] * points.tokens[top])
    return Points.of(sizes, flops / each / sizes, flops=flops)


class _Frame:
    """Axes: log compute across, loss up."""

    def __init__(self, x: Floats, loss: Floats) -> None:
        margin = 0.03 * float(x[1] - x[0])
        self.x = (float(x[0]) - margin, float(x[1]) + margin)
        pad = 0.05 * float(loss.max() - loss.min() + 1e-9)
        self.y = (float(loss.min()) - pad, float(loss.max()) + pad)

    def path(self, values: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self._across(x):.1f},{self._up(y):.1f}" for x, y in values)

    def grid(self) -> list[str]:
        """Lines and labels at decades of compute and round losses."""
        parts = []
        decades = range(int(np.ceil(self.x[0] / np.log(10))), int(self.x[1] / np.log(10)) + 1)
        for d in decades:
            x = self._across(d * float(np.log(10)))
            parts.append(_line(x, TOP, x, HEIGHT - BOTTOM))
            parts.append(_text(x, HEIGHT - BOTTOM + 18, f"1e{d}", anchor="middle"))
        for value in _round_values(self.y):
            y = self._up(value)
            parts.append(_line(LEFT, y, WIDTH - RIGHT, y))
            parts.append(_text(LEFT - 8, y + 4, f"{value:.4g}", anchor="end"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 12, "training compute, FLOPs", anchor="middle"))
        parts.append(_text(LEFT, TOP - 2, "nats per token", colour=SOFT, size=11))
        return parts

    def _across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def _up(self, y: float) -> float:
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_values(ends: Sequence[float], count: int = 6) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten between the ends."""
    raw = (ends[1] - ends[0]) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw)
    first = int(np.ceil(ends[0] / step))
    return [float(n * step) for n in range(first, int(np.floor(ends[1] / step)) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def _text(
    x: float, y: float, said: str, *, anchor: str = "start", colour: str = INK, size: int = 12
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
        f' font-size="{size}">{escape(said)}</text>'
    )
