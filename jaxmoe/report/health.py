"""Figures 3 and 5: optimiser, speed."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from jaxmoe.report.plot import (
    BLUE,
    INK,
    ORANGE,
    SOFT,
    Figure,
    Point,
    Trace,
    axis,
    layout,
    line,
    points,
    round_,
    stacked,
)
from jaxmoe.report.records import Run, group, number
from jaxmoe.report.words import percent, seconds, step

__all__ = ["optimiser", "speed"]


def optimiser(run: Run) -> Figure:
    rates, norms = points(run.metrics, "train/lr"), points(run.metrics, "train/grad_norm")
    title = "Learning rate and gradient norm"
    if not rates and not norms:
        return Figure(id="optimiser", title=title, caption="Neither is logged yet.")
    clip = number(group(run.config, "optim"), "clip")
    traces = [
        line(
            rates, "learning rate", "%{y:.3g}", line={"color": BLUE, "width": 2}, showlegend=False
        ),
        line(
            norms,
            "gradient norm",
            "%{y:.3g}",
            line={"color": SOFT, "width": 1},
            yaxis="y2",
            showlegend=False,
        ),
    ]
    if clip and norms:
        traces.append(_level(norms, clip, f"clip, {clip:g}", "y2"))
    return Figure(
        id="optimiser",
        title=title,
        caption=_optimiser_caption(rates, norms, clip),
        traces=traces,
        layout=_panels(
            run,
            400,
            [
                axis("learning rate", rangemode="tozero", exponentformat="power"),
                axis("gradient norm", type="log", **_log_ticks(norms)),
            ],
        ),
    )


def speed(run: Run) -> Figure:
    panels = (
        ("perf/tokens_per_second", "tokens/s", "%{y:.4s} tokens/s", {"color": BLUE, "width": 1.5}),
        ("perf/mfu", "MFU", "%{y:.1%} MFU", {"color": ORANGE, "width": 1.5}),
        ("perf/step_seconds", "s/step", "%{y:.3g} s", {"color": INK, "width": 1.2}),
    )
    series = [points(run.metrics, key) for key, _, _, _ in panels]
    title = "Speed"
    if not any(series):
        return Figure(id="speed", title=title, caption="No speed is logged yet.")
    traces = [
        line(values, name, hover, line=style, yaxis=("y", "y2", "y3")[i], showlegend=False)
        for i, ((_, name, hover, style), values) in enumerate(zip(panels, series, strict=True))
    ]
    formats = ("~s", ".0%" if _top(series[1]) >= 0.05 else ".2~%", "~g")
    axes = [
        axis(name, rangemode="tozero", tickformat=form, nticks=5)
        for (_, name, _, _), form in zip(panels, formats, strict=True)
    ]
    return Figure(
        id="speed",
        title=title,
        caption=_speed_caption(run, *series),
        traces=traces,
        layout=_panels(run, 470, axes),
    )


def _panels(run: Run, height: int, axes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Panels above each other over one axis of steps."""
    names = ["yaxis", *(f"yaxis{i}" for i in range(2, len(axes) + 1))]
    domains = stacked(len(axes))
    placed = {n: {**a, "domain": d} for n, a, d in zip(names, axes, domains, strict=True)}
    x = axis("step", anchor=f"y{len(axes)}", range=[0, run.step * 1.02])
    return layout(height, x=x, **placed)


def _level(values: Sequence[Point], level: float, name: str, yaxis: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [values[0][0], values[-1][0]],
        "y": [level, level],
        "yaxis": yaxis,
        "hoverinfo": "skip",
        "line": {"color": INK, "width": 1.2, "dash": "dash"},
    }


def _log_ticks(values: Sequence[Point]) -> dict[str, Any]:
    """1, 2, 5 of each decade, written out: plotly writes 0.5 as a bare 5. Powers of ten if wide."""
    sizes = [y for _, y, _ in values if y > 0]
    if not sizes or max(sizes) > 1000 * min(sizes):
        return {"dtick": 1, "exponentformat": "power"}
    decades = range(math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))) + 1)
    ticks = [round_(m * 10.0**k) for k in decades for m in (1, 2, 5)]
    return {"tickvals": ticks, "tickformat": "~g"}


def _top(values: Sequence[Point]) -> float:
    return max((y for _, y, _ in values), default=0.0)


def _optimiser_caption(rates: Sequence[Point], norms: Sequence[Point], clip: float | None) -> str:
    said = []
    if rates:
        peak_at, peak, _ = max(rates, key=lambda point: point[1])
        now = rates[-1][1]
        said.append(
            f"The learning rate peaked at {peak:.3g} (step {step(peak_at)}) and ends at {now:.3g}."
        )
    if norms:
        worst_at, worst, _ = max(norms, key=lambda point: point[1])
        middle = median(y for _, y, _ in norms)
        said.append(
            f"The gradient norm has a median of {middle:.3g} and was largest, {worst:.3g}, "
            f"at step {step(worst_at)}."
        )
        if clip:
            share = sum(y > clip for _, y, _ in norms) / len(norms)
            said.append(f"It was clipped at {clip:g} in {percent(share)} of the logged steps.")
    return " ".join(said)


def _speed_caption(run: Run, rate: list[Point], mfu: list[Point], pace: list[Point]) -> str:
    said = []
    for values, form in (
        (rate, "{:,.0f} tokens/s"),
        (mfu, "an MFU of {:.1%}"),
        (pace, "{:.3g} s a step"),
    ):
        if values:
            said.append(form.format(median(y for _, y, _ in values)))
    text = f"Medians: {', '.join(said)}."
    if pace:
        slow_at, slow, _ = max(pace, key=lambda point: point[1])
        text += f" The slowest logged step took {seconds(slow)} (step {step(slow_at)})."
    compiling = number(run.environment, "compile_seconds")
    if compiling is not None:
        text += f" Compilation took {seconds(compiling)}."
    return text
