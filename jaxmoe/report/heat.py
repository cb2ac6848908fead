"""Expert load of several runs side by side: a heat map each, of all layers or one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe.report.experts import CELLS, History, Line, layer_names, read_history
from jaxmoe.report.overlay import Shown
from jaxmoe.report.plot import SOFT, Figure, axis, layout, text
from jaxmoe.report.progress import AXES
from jaxmoe.report.records import group
from jaxmoe.report.words import plural, step

__all__ = ["loads"]

PANEL, GAP = 170, 58  # pixels
KINDS = (
    ("Most loaded expert of each layer", "load_max"),
    ("Least loaded expert of each layer", "load_min"),
    ("Evenness (entropy) of each layer", "load_entropy"),
)


@dataclass(frozen=True, kw_only=True)
class _Mapped:
    shown: Shown
    history: History
    layers: list[str]


def loads(runs: Sequence[Shown]) -> Figure:
    title = "Expert load by layer, over time"
    read = [(shown, read_history(shown.run.metrics, CELLS // len(runs))) for shown in runs]
    found = [
        _Mapped(shown=s, history=h, layers=layer_names(group(s.run.config, "model"), _count(h)))
        for s, h in read
        if h is not None
    ]
    without = [shown.label for shown, history in read if history is None]
    if not found:
        said = "No expert load is logged: dense runs, or records without metrics."
        return Figure(id="load", title=title, caption=said)
    choices = [
        _choice(name, [_of_layers(one, key) for one in found], "layer")
        for name, key in KINDS
        if any(key in one.history.lines for one in found)
    ]
    for i in range(max(len(one.layers) for one in found)):
        maps = [_of_experts(one, i) for one in found]
        if any(z for z, _ in maps):
            names = {one.layers[i] for one in found if i < len(one.layers)}
            choices.append(_choice(f"Experts of layer {'/'.join(sorted(names))}", maps, "expert"))
    first = choices[0]
    return Figure(
        id="load",
        title=title,
        caption=_caption(found, without),
        traces=[_trace(i, one, first["marks"][f"heat-{i}"]) for i, one in enumerate(found)],
        layout=_layout(found, first),
        extra={"layers": choices},
    )


def _count(history: History) -> int:
    return len(history.lines["load_min"])


def _of_layers(one: _Mapped, key: str) -> tuple[list[Line], list[str]]:
    """z, layers x steps, and what its rows are."""
    lines = one.history.lines.get(key, [])
    return [[v if v is None else round(v, 3) for v in line] for line in lines], one.layers


def _of_experts(one: _Mapped, layer: int) -> tuple[list[Line], list[str]]:
    maps = one.history.loads or []
    if layer >= len(maps):
        return [], []
    return [[*row] for row in maps[layer]], [str(i) for i in range(len(maps[layer]))]


def _choice(
    name: str, maps: Sequence[tuple[Sequence[Line], list[str]]], what: str
) -> dict[str, Any]:
    values = sorted(v for z, _ in maps for row in z for v in row if v is not None)
    # A few cells may saturate, or they alone would be seen.
    low, high = (values[len(values) // 200], values[-1 - len(values) // 200]) if values else (0, 1)
    colours = {"coloraxis.cmin": low, "coloraxis.cmax": high if high > low else low + 0.01}
    titles = {f"yaxis{i + 1 if i else ''}.title.text": what for i in range(len(maps))}
    marks = {f"heat-{i}": {"z": z, "y": rows} for i, (z, rows) in enumerate(maps)}
    return {"name": name, "marks": marks, "layout": {**colours, **titles}}


def _trace(i: int, one: _Mapped, marks: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "meta": f"heat-{i}",
        "x": one.shown.progress.at("share", one.history.steps),
        "customdata": None,
        "coloraxis": "coloraxis",
        "xaxis": f"x{i + 1}" if i else "x",
        "yaxis": f"y{i + 1}" if i else "y",
        "hovertemplate": f"%{{y}}: %{{z:.2f}}<br>%{{x:.1f}} % of the run"
        f"<extra>{text(one.shown.label)}</extra>",
        **marks,
    }


def _layout(found: Sequence[_Mapped], first: dict[str, Any]) -> dict[str, Any]:
    inner = PANEL * len(found) + GAP * (len(found) - 1)
    axes: dict[str, Any] = {}
    notes = []
    for i, one in enumerate(found):
        top = 1 - i * (PANEL + GAP) / inner
        domain = [max(0.0, top - PANEL / inner), top]
        last = i == len(found) - 1
        name = str(i + 1) if i else ""
        axes[f"xaxis{name}"] = axis(
            AXES["share"] if last else "", anchor=f"y{name}", showgrid=False, range=[0, 100]
        )
        # As categories: layers have numbers with holes, and plotly would draw those.
        axes[f"yaxis{name}"] = axis(
            first["layout"][f"yaxis{name}.title.text"],
            anchor=f"x{name}",
            domain=domain,
            type="category",
            showgrid=False,
            nticks=8,
        )
        place = {"x": 0, "y": top, "xref": "paper", "yref": "paper"}
        style = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "yshift": 2}
        notes.append({**place, **style, "text": f"<b>{text(one.shown.label)}</b>"})
    own = layout(inner + 100, x=axes.pop("xaxis"), **axes)
    return {
        **own,
        "margin": {**own["margin"], "t": 30},
        "annotations": notes,
        "coloraxis": {
            # Lightness rises all the way, so that grey prints in the right order.
            "colorscale": "Cividis",
            "cmin": first["layout"]["coloraxis.cmin"],
            "cmax": first["layout"]["coloraxis.cmax"],
            "colorbar": {"thickness": 10, "xpad": 4, "tickfont": {"color": SOFT}},
        },
    }


def _caption(found: Sequence[_Mapped], without: Sequence[str]) -> str:
    said = ["1 is an even share; lighter is more. All maps of a choice share one scale."]
    for one in found:
        peak = [[v or 0 for v in line] for line in one.history.lines["load_max"]]
        most, layer, at = max(
            (value, one.layers[i], one.history.steps[k])
            for i, line in enumerate(peak)
            for k, value in enumerate(line)
        )
        said.append(
            f"{one.shown.label}: {plural(len(one.layers), 'layer')} with experts; the most loaded "
            f"expert had {most:.2f} times its share, in layer {layer} at step {step(at)}."
        )
        if one.history.loads is None:
            said.append("It has too many experts to log the load of each.")
    if without:
        said.append(f"Nothing is logged of {', '.join(without)}.")
    return " ".join(said)
