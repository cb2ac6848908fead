"""Figure 4: how evenly the experts of each layer are used, and what evens them out.

One layer is shown at a time, over dotted lines of all of them. With many experts a run logs no load
of each one (`moe/load`), only what `moe/layer/*` says of a layer; then there is no heat map.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe.report.plot import BLUE, SOFT, Figure, Trace, axis, layout, points, round_
from jaxmoe.report.records import Row, Run, group, number
from jaxmoe.report.words import fixed, percent, plural, short, step

__all__ = ["CELLS", "History", "Line", "layer_names", "load", "read_history"]

CELLS = 300_000  # of all heat maps together: beyond it a page grows without showing more
COLUMNS = 240
GAP = 44  # pixels between panels
TABLE = (
    ("least loaded", "load_min", 2),
    ("most loaded", "load_max", 2),
    ("entropy", "load_entropy", 4),
    ("dead", "dead", 0),
    ("dropped", "drop_rate", None),
    ("balance loss", "load_balance", 3),
    ("router z", "router_z", 3),
    ("bias from", "bias_low", 4),
    ("bias to", "bias_high", 4),
)

Grid = list[list[float]]  # experts x steps, or layers x experts
Line = list[float | None]  # a value a step; None where that step's line has none
Marks = dict[str, dict[str, Any]]  # what of a trace, by its `meta`, is of the chosen layer


@dataclass(frozen=True, kw_only=True)
class History:
    """Of each layer with experts, over the steps shown."""

    steps: list[float]
    loads: list[Grid] | None  # of every expert
    lines: dict[str, list[Line]]  # moe/layer/KEY -> layers; those that are logged at all


@dataclass(frozen=True, kw_only=True)
class _Panel:
    pixels: int
    axis: dict[str, Any]
    traces: list[Trace]  # shown at first
    marks: list[Marks]  # of each layer


def load(run: Run) -> Figure:
    """Share of the tokens each expert gets, times the number of experts: 1 is balanced."""
    title = "Expert load"
    history = read_history(run.metrics)
    if history is None:
        dense = number(group(run.config, "model"), "n_experts") == 1
        said = "A dense model: it has no experts." if dense else "No expert load is logged yet."
        return Figure(id="load", title=title, caption=said)
    panels = [panel for make in (_heat, _band, _entropy, _dead, _bias) if (panel := make(history))]
    names = layer_names(group(run.config, "model"), len(history.lines["load_min"]))
    marks = [_merged(panel.marks[i] for panel in panels) for i in range(len(names))]
    return Figure(
        id="load",
        title=title,
        caption=_caption(run, history),
        traces=_traces(panels),
        layout=_layout(panels),
        extra={"layers": [{"name": n, "marks": m} for n, m in zip(names, marks, strict=True)]},
        table=_table(history, names),
    )


def layer_names(model: Row, count: int) -> list[str]:
    """Numbers of the layers with experts, as in the model (model/stack.py, kinds); then the modules
    of multi-token prediction. Plain numbers where the config does not explain `count` of them."""
    whole = {key: int(number(model, key) or 0) for key in ("n_layers", "first_dense", "n_mtp")}
    every = max(1, int(number(model, "moe_every") or 1))
    after = range(whole["first_dense"], whole["n_layers"])
    names = [str(i) for i in after if (i - whole["first_dense"] + 1) % every == 0]
    names += [f"MTP {k}" for k in range(1, whole["n_mtp"] + 1)]
    return names if len(names) == count else [str(i) for i in range(count)]


# Reading


def read_history(rows: Sequence[Row], cells: int = CELLS) -> History | None:
    """None where no row says anything of experts. `cells`: values at most, about."""
    read = [(row, _loads(row)) for row in rows]
    # Those that know every expert's load, if there are such: others would be holes in the map.
    read = [r for r in read if r[1]] or [r for r in read if _layers(r[0], "load_min")]
    if not read:
        return None
    read = [r for r in read if _shape(*r) == _shape(*read[-1])]
    count, n_experts = _shape(*read[-1])
    read = _thinned(read, max(20, min(COLUMNS, cells // (count * (n_experts + len(TABLE))))))
    lines = {}
    for _, key, _ in TABLE:
        by_step = [_layers(row, key) or _derived(loads, key) for row, loads in read]
        by_step = [values if len(values) == count else [None] * count for values in by_step]
        if any(values[0] is not None for values in by_step):
            lines[key] = [list(line) for line in zip(*by_step, strict=True)]
    if not {"load_min", "load_max"} <= lines.keys():
        return None
    return History(
        steps=[row["step"] for row, _ in read],
        loads=[_map([loads[layer] for _, loads in read]) for layer in range(count)]
        if n_experts
        else None,
        lines=lines,
    )


def _shape(row: Row, loads: Grid) -> tuple[int, int]:
    """Layers and experts; 0 experts where their loads are not known."""
    return (len(loads), len(loads[0])) if loads else (len(_layers(row, "load_min")), 0)


def _loads(row: Row) -> Grid:
    """moe/load of a row, or nothing if it is not layers of experts."""
    layers = row.get("moe/load")
    if not isinstance(layers, list) or not all(isinstance(x, list) and x for x in layers):
        return []
    values = [value for layer in layers for value in layer]
    return layers if _finite(values) and len({len(layer) for layer in layers}) == 1 else []


def _layers(row: Row, key: str) -> list[float]:
    """moe/layer/KEY of a row, or nothing if it is not numbers."""
    values = row.get(f"moe/layer/{key}")
    return values if isinstance(values, list) and _finite(values) else []


def _derived(layers: Grid, key: str) -> list[float]:
    """The range of the loads of a run from before moe/layer/* was logged."""
    reduce: dict[str, Callable[..., float]] = {"load_min": min, "load_max": max}
    return [reduce[key](layer) for layer in layers] if key in reduce else []


def _finite(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _thinned(rows: list[Any], limit: int) -> list[Any]:
    stride = -(-len(rows) // limit)
    return rows[::-1][::stride][::-1]  # counted from the end: the last step always stays


def _map(columns: Grid) -> Grid:
    """experts x steps"""
    return [[round(value, 3) for value in expert] for expert in zip(*columns, strict=True)]


# Panels


def _heat(history: History) -> _Panel | None:
    if history.loads is None:
        return None
    values = sorted(abs(value - 1) for z in history.loads for row in z for value in row)
    # How far from 1 the colours reach. A few cells may saturate, or they alone would be seen.
    reach = max(0.25, values[-1 - len(values) // 200])
    trace = {
        "type": "heatmap",
        "meta": "heat",
        "x": history.steps,
        "zmin": max(0.0, 1 - reach),
        "zmax": 1 + reach,
        # Lightness rises with the load all the way, so that grey prints in the right order.
        "colorscale": "Cividis",
        "hovertemplate": "expert %{y}: %{z:.2f} of its even share<br>step %{x:,}<extra></extra>",
    }
    n_experts = len(history.loads[0])
    ticks = {"tickmode": "linear", "dtick": max(1, n_experts // 8), "tick0": 0}
    return _Panel(
        pixels=264,
        axis=axis("expert", showgrid=False, **ticks),
        traces=[trace],
        marks=[{"heat": {"z": z}} for z in history.loads],
    )


def _band(history: History) -> _Panel:
    return _range(
        history,
        ("load_min", "load_max"),
        name="band",
        says="this layer, least to most loaded expert",
        hover="%{y:.2f} of an even share",
        ends=("least loaded", "most loaded"),
        y=axis("load", rangemode="tozero", nticks=5),
    )


def _bias(history: History) -> _Panel | None:
    if "bias_high" not in history.lines or "bias_low" not in history.lines:
        return None
    return _range(
        history,
        ("bias_low", "bias_high"),
        name="bias",
        says="this layer's bias",
        hover="%{y:.3g}",
        ends=("lowest bias", "highest bias"),
        y=axis("bias", nticks=5),
    )


def _entropy(history: History) -> _Panel | None:
    if "load_entropy" not in history.lines:
        return None
    return _single(
        history,
        "load_entropy",
        over=("least even layer", min),
        hover="%{y:.4f} of an even spread",
        y=axis("entropy", nticks=5),
    )


def _dead(history: History) -> _Panel | None:
    """Only where there ever was one."""
    most = max((v for line in history.lines.get("dead", []) for v in line if v), default=0)
    if not most:
        return None
    return _single(
        history,
        "dead",
        over=("all layers together", sum),
        hover="%{y} dead experts",
        y=axis("dead", rangemode="tozero", dtick=math.ceil(most / 3)),
    )


def _range(
    history: History,
    keys: tuple[str, str],
    *,
    name: str,
    says: str,
    hover: str,
    ends: tuple[str, str],
    y: dict[str, Any],
) -> _Panel:
    """A band of the layer from one key to the other, inside the extremes of all."""
    low, high = (history.lines[key] for key in keys)
    band = {
        "meta": name,
        "name": says,
        "fill": "toself",
        "fillcolor": "rgba(27,94,155,0.25)",
        "line": {"color": BLUE, "width": 1},
        "hoverinfo": "skip",
        "showlegend": name == "band",
    }
    top = _over(history, high, max, ends[1], hover, legend=name == "band")
    bottom = _over(history, low, min, ends[0], hover)
    return _Panel(
        pixels=126,
        axis=y,
        traces=[band, top, bottom],
        marks=[{name: _ring(history.steps, *pair)} for pair in zip(low, high, strict=True)],
    )


def _single(
    history: History,
    key: str,
    *,
    over: tuple[str, Callable[..., float]],
    hover: str,
    y: dict[str, Any],
) -> _Panel:
    """A line of the layer, and a dotted one over all of them."""
    lines = history.lines[key]
    own = {
        "meta": key,
        "name": "this layer",
        "x": history.steps,
        "hovertemplate": f"{hover}<br>step %{{x:,}}<extra>this layer</extra>",
        "line": {"color": BLUE, "width": 1.5},
        "showlegend": False,
    }
    traces = [own, _over(history, lines, over[1], over[0], hover)]
    return _Panel(pixels=96, axis=y, traces=traces, marks=[{key: {"y": line}} for line in lines])


def _over(
    history: History,
    lines: list[Line],
    reduce: Callable[..., float],
    name: str,
    hover: str,
    *,
    legend: bool = False,
) -> Trace:
    """One value a step of all layers."""
    columns = [[v for v in column if v is not None] for column in zip(*lines, strict=True)]
    return {
        "name": "all layers",
        "x": history.steps,
        "y": [round_(reduce(column)) if column else None for column in columns],
        "line": {"color": SOFT, "width": 1.2, "dash": "dot"},
        "hovertemplate": f"{hover}<br>step %{{x:,}}<extra>{name}</extra>",
        "showlegend": legend,
    }


def _ring(steps: list[float], low: Line, high: Line) -> dict[str, Any]:
    """Along the lower line and back along the upper one."""
    known = [(x, a, b) for x, a, b in zip(steps, low, high, strict=True) if None not in (a, b)]
    xs, lows, highs = (list(column) for column in zip(*known, strict=True)) if known else ([],) * 3
    return {"x": xs + xs[::-1], "y": lows + highs[::-1]}


# Putting them together


def _traces(panels: Sequence[_Panel]) -> list[Trace]:
    """Of all panels, at the first layer."""
    placed = []
    for i, panel in enumerate(panels):
        for trace in panel.traces:
            own = panel.marks[0].get(trace.get("meta", ""), {})
            common: Trace = {"yaxis": f"y{i + 1}" if i else "y"}
            if trace.get("type") == "heatmap":
                bar = {"title": {"text": "load"}, "thickness": 10, "xpad": 4, "yanchor": "top"}
                common["colorbar"] = {**bar, "lenmode": "pixels", "len": panel.pixels, "y": 1}
            else:
                common |= {"type": "scatter", "mode": "lines"}
            placed.append({**common, **trace, **own})
    return placed


def _layout(panels: Sequence[_Panel]) -> dict[str, Any]:
    inner = sum(panel.pixels for panel in panels) + GAP * (len(panels) - 1)
    axes, top = {}, 1.0
    for i, panel in enumerate(panels):
        bottom = max(0.0, top - panel.pixels / inner)
        axes[f"yaxis{i + 1}" if i else "yaxis"] = {**panel.axis, "domain": [bottom, top]}
        top = bottom - GAP / inner
    x = axis("step", anchor=f"y{len(panels)}", showgrid=False)
    return layout(inner + 64, x=x, **axes)  # 64: the margins


def _merged(marks: Any) -> Marks:
    return {name: values for one in marks for name, values in one.items()}


def _table(history: History, names: Sequence[str]) -> list[list[str]]:
    """A head and a row for each layer, of the last step."""
    columns = [column for column in TABLE if column[1] in history.lines]
    rows = [["layer", *(title for title, _, _ in columns)]]
    for i, name in enumerate(names):
        values = [(history.lines[key][i][-1], digits) for _, key, digits in columns]
        rows.append([name, *(percent(v, 2) if n is None else fixed(v, n) for v, n in values)])
    return rows


def _caption(run: Run, history: History) -> str:
    last = run.last
    lows, highs = (
        [y for y in _over(history, history.lines[key], end, "", "")["y"] if y is not None] or [0.0]
        for key, end in (("load_min", min), ("load_max", max))
    )
    lighter = "1 is an even share" + ("; lighter is more. " if history.loads else ". ")
    said = (
        f"{lighter}At the last step shown the most loaded expert "
        f"of any layer took {highs[-1]:.2f} times its even share and the least loaded "
        f"{lows[-1]:.2f}; over the run the extremes were {max(highs):.2f} and {min(lows):.2f}."
    )
    if "load_entropy" in history.lines:
        said += " The entropy is of the experts' shares, over its largest value: 1 is even."
    said += _dead_said(run)
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


def _dead_said(run: Run) -> str:
    dead = [(y, x) for x, y, _ in points(run.metrics, "moe/dead_experts")]
    if not dead:
        return ""
    most, at = max(dead, key=lambda pair: pair[0])
    if not most:
        return " No expert was dead (under 1 % of an even share) at a logged step."
    return (
        f" Dead (under 1 % of an even share in a step): {plural(int(dead[-1][0]), 'expert')} "
        f"at the end, {int(most)} at worst, at step {step(at)}."
    )
