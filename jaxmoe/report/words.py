"""Numbers as people write them. None, which a partial record is full of, becomes a dash."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "big",
    "fixed",
    "flat",
    "percent",
    "plural",
    "seconds",
    "short",
    "side",
    "step",
    "tied",
    "when",
]

DASH = "\u2013"
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def fixed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """Three significant digits."""
    return DASH if value is None else f"{value:.3g}"


def step(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def percent(share: float | None, digits: int = 0) -> str:
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def big(value: float | None, unit: str = "") -> str:
    """Three digits and an SI prefix: 12.3 M, 4.56 TFLOP."""
    if value is None:
        return DASH
    value = float(f"{value:.3g}")  # first, or 999,999 would be 1e+03 k
    power = min(max(0, int(math.log10(max(abs(value), 1)) // 3)), len(PREFIXES) - 1)
    digits = f"{value:.3g}" if power == 0 else f"{value / 1000**power:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[power]}{unit}".rstrip()


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.3g} s"
    minutes, hours = value / 60, value / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def tied(text: str) -> str:
    """Keeps a percent sign on the line of its number."""
    return text.replace(" %", "\u00a0%")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def side(error: float) -> str:
    """`error` as a share of the truth, forecast less outcome: '0.6 % too high'."""
    if abs(error) < 5e-5:
        return "right to 0.01 %"
    return f"{percent(abs(error), 2)} too {'high' if error > 0 else 'low'}"


def when(time: Any) -> str:
    """Seconds since 1970 or an ISO string, as UTC to the second."""
    if isinstance(time, (int, float)) and math.isfinite(time) and 0 <= time < 1e11:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return DASH if time is None else str(time)


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf."""
    leaves: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += flat(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", _leaf(value)))
    return leaves


def _leaf(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_leaf, value)) or "(empty)"
    return str(value) if value != "" else "(empty)"
