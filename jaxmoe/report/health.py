"""Figures 3 to 5: optimiser, expert load, speed."""

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
from jaxmoe.report.records import Row, Run, group, number
from jaxmoe.report.words import percent, seconds, short, step

__all__ = ["load", "optimiser", "speed"]

CELLS = 300_000  # of all heat maps together: beyond it a page grows without showing more
COLUMNS = 240


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


def load(run: Run) -> Figure:
    """Share of the tokens each expert gets, times the number of experts: 1 is balanced."""
    title = "Expert load"
    rows = [(row["step"], layers) for row in run.metrics if (layers := _layers(row))]
    if not rows:
        return Figure(id="load", title=title, caption="No expert load is logged yet.")
    rows = [row for row in rows if _shape(row[1]) == _shape(rows[-1][1])]
    n_layers, n_experts = _shape(rows[-1][1])
    rows = _thinned(rows, max(20, min(COLUMNS, CELLS // (n_layers * n_experts))))
    steps = [x for x, _ in rows]
    maps = [_map(rows, layer) for layer in range(n_layers)]
    lows, highs = _extremes(rows)
    return Figure(
        id="load",
        title=title,
        caption=_load_caption(run, lows, highs),
        traces=[_heat(steps, maps[0], _reach(maps)), *_load_band(steps, maps[0], lows, highs)],
        layout=_load_layout(n_experts),
        extra={"layers": [{"z": z, **_layer_band(steps, z)} for z in maps]},
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


def _layers(row: Row) -> list[list[float]]:
    """moe/load of a row, or nothing if it is not layers of experts."""
    layers = row.get("moe/load")
    if not isinstance(layers, list) or not all(isinstance(x, list) and x for x in layers):
        return []
    values = [value for layer in layers for value in layer]
    numeric = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    return layers if numeric and len({len(layer) for layer in layers}) == 1 else []


def _shape(layers: list[list[float]]) -> tuple[int, int]:
    return len(layers), len(layers[0])


def _thinned(rows: list[Any], limit: int) -> list[Any]:
    stride = -(-len(rows) // limit)
    return rows[::-1][::stride][::-1]  # counted from the end: the last step always stays


def _map(rows: Sequence[Any], layer: int) -> list[list[float]]:
    """experts x steps"""
    columns = [layers[layer] for _, layers in rows]
    return [[round(value, 3) for value in expert] for expert in zip(*columns, strict=True)]


def _reach(maps: list[list[list[float]]]) -> float:
    """How far from 1 the colours reach. A few cells may saturate, or they alone would be seen."""
    values = sorted(abs(value - 1) for z in maps for row in z for value in row)
    return max(0.25, values[-1 - len(values) // 200])


def _extremes(rows: Sequence[Any]) -> tuple[list[float], list[float]]:
    """The lowest and the highest load over all layers and experts, at each step."""
    flat = [[value for layer in layers for value in layer] for _, layers in rows]
    return [round_(min(values)) for values in flat], [round_(max(values)) for values in flat]


def _layer_band(steps: list[float], z: list[list[float]]) -> dict[str, Any]:
    columns = list(zip(*z, strict=True))
    lows, highs = [min(c) for c in columns], [max(c) for c in columns]
    return {"x": steps + steps[::-1], "y": lows + highs[::-1]}


def _heat(steps: list[float], z: list[list[float]], reach: float) -> Trace:
    return {
        "type": "heatmap",
        "meta": "heat",
        "x": steps,
        "z": z,
        "zmin": max(0.0, 1 - reach),
        "zmax": 1 + reach,
        # Lightness rises with the load all the way, so that grey prints in the right order.
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "load"}, "thickness": 10, "len": 0.58, "y": 0.71, "xpad": 4},
        "hovertemplate": "expert %{y}: %{z:.2f} of its even share<br>step %{x:,}<extra></extra>",
    }


def _load_band(
    steps: list[float], z: list[list[float]], lows: list[float], highs: list[float]
) -> list[Trace]:
    common = {"type": "scatter", "mode": "lines", "yaxis": "y2"}
    dotted = {"line": {"color": SOFT, "width": 1.2, "dash": "dot"}, "x": steps}
    hover = "%{y:.2f} of an even share<br>step %{x:,}"
    return [
        {
            **common,
            **_layer_band(steps, z),
            "meta": "band",
            "name": "this layer, least to most loaded expert",
            "fill": "toself",
            "fillcolor": "rgba(27,94,155,0.25)",
            "line": {"color": BLUE, "width": 1},
            "hoverinfo": "skip",
        },
        {
            **common,
            **dotted,
            "name": "all layers",
            "y": highs,
            "hovertemplate": f"{hover}<extra>most loaded</extra>",
        },
        {
            **common,
            **dotted,
            "y": lows,
            "showlegend": False,
            "hovertemplate": f"{hover}<extra>least loaded</extra>",
        },
    ]


def _load_layout(n_experts: int) -> dict[str, Any]:
    ticks = {"tickmode": "linear", "dtick": max(1, n_experts // 8), "tick0": 0}
    return layout(
        520,
        x=axis("step", anchor="y2", showgrid=False),
        yaxis=axis("expert", domain=[0.42, 1], showgrid=False, **ticks),
        yaxis2=axis("load", domain=[0, 0.34], rangemode="tozero"),
    )


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


def _load_caption(run: Run, lows: list[float], highs: list[float]) -> str:
    last = run.metrics[-1]
    said = (
        "1 is an even share; lighter is more. At the last step shown the most loaded expert "
        f"of any layer took {highs[-1]:.2f} times its even share and the least loaded "
        f"{lows[-1]:.2f}; over the run the extremes were {max(highs):.2f} and {min(lows):.2f}."
    )
    drops = [y for _, y, _ in points(run.metrics, "moe/drop_rate")]
    if drops:
        most = max(drops)
        said += (
            f" Tokens dropped: {percent(drops[-1], 2)} at the end, {percent(most, 2)} at worst."
            if most > 0
            else " No token was dropped."
        )
    rest = (("balance loss", "moe/load_balance"), ("router z", "moe/router_z"))
    values = [(name, number(last, key)) for name, key in rest]
    known = [f"{name} {short(value)}" for name, value in values if value is not None]
    return f"{said} Last {' and '.join(known)}." if known else said


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
