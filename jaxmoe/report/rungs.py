"""The ladder: its runs, the law that they fit, and the runs that were forecast from it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmoe.ladder.fit import LEVELS, Analysis, analyse
from jaxmoe.ladder.picture import along
from jaxmoe.ladder.reading import open_ladder
from jaxmoe.ladder.targets import Forecasted, read_targets
from jaxmoe.report.plot import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    Figure,
    Trace,
    axis,
    layout,
    round_,
    text,
)
from jaxmoe.report.records import Run
from jaxmoe.report.words import big, fixed, percent, plural

__all__ = ["fitted"]

STEPS = 60  # of the law's line
APART = 1.12  # times the compute: targets that are nearer are drawn beside each other
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hourglass")


def fitted(places: Sequence[Path], runs: Sequence[Run]) -> Figure:
    """The fit of a ladder's records, with those runs whose forecast is from before their start.

    Raises:
        UserError: no records, too few to fit, or not of one recipe.
    """
    ladder = open_ladder(*places)
    before = [r for r in runs if any(f.cutoff_step == 0 for f in r.forecasts)]
    found = analyse(ladder, targets=read_targets([r.path for r in before], ladder))
    return Figure(
        id="ladder",
        title="The ladder, and its target" if before else "The ladder",
        caption=_caption(found, places),
        traces=[*_law(found), *_rungs(found), *_targets(found.targets)],
        layout=layout(
            460,
            x=axis("training compute, FLOPs", type="log", exponentformat="power", dtick=1),
            yaxis=axis("held-out loss, nats/token"),
        ),
        table=_table(found),
    )


def _law(found: Analysis) -> list[Trace]:
    """Along the ladder's own line of sizes; there is no single line where experts vary."""
    if found.joint:
        return []
    points = found.ladder.points
    end = max([float(points.flops.max()), *(t.flops for t in found.targets)])
    flops = np.geomspace(float(points.flops.min()), end * 1.1, STEPS)
    levels = found.fit.mixture(along(points, flops)).quantile(LEVELS)
    low, middle, high = ([round_(float(v)) for v in row] for row in levels)
    x = [round_(float(v)) for v in flops]
    common: Trace = {"type": "scatter", "mode": "lines"}
    return [
        {
            **common,
            "name": "law, 90 %",
            "x": x + x[::-1],
            "y": low + high[::-1],
            "fill": "toself",
            "fillcolor": "rgba(27,94,155,0.13)",
            "line": {"color": BLUE, "width": 0.8, "dash": "dot"},
            "hoverinfo": "skip",
        },
        {
            **common,
            "name": "law, median",
            "x": x,
            "y": middle,
            "line": {"color": BLUE, "width": 2},
            "hovertemplate": "%{y:.4f} nats/token<br>%{x:.3s} FLOPs<extra>law</extra>",
        },
    ]


def _rungs(found: Analysis) -> list[Trace]:
    """A trace for each number of experts and top-k."""
    points = found.ladder.points
    kinds = sorted({*zip(points.experts.tolist(), points.top_k.tolist(), strict=True)})
    traces = []
    for i, (experts, top_k) in enumerate(kinds):
        chosen = np.flatnonzero((points.experts == experts) & (points.top_k == top_k))
        rows = [found.ladder.rows[k] for k in chosen]
        name = "rungs" if len(kinds) == 1 else f"rungs, {experts:g} experts, top {top_k:g}"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [round_(float(points.flops[k])) for k in chosen],
                "y": [round_(float(points.loss[k])) for k in chosen],
                "text": [f"rung {r['rung']}, seed {r['seed']}" for r in rows],
                "hovertemplate": "%{text}<br>%{y:.4f} nats/token<extra></extra>",
                "marker": {
                    "symbol": SYMBOLS[i % len(SYMBOLS)],
                    "size": 7,
                    "color": "#fff",
                    "line": {"color": ORANGE, "width": 1.5},
                },
            }
        )
    return traces


def _targets(targets: Sequence[Forecasted]) -> list[Trace]:
    """Of each the median that was registered, open, with its 90 % interval; filled: what came."""
    traces: list[Trace] = []
    for i, t in enumerate(targets):
        beside = sum(abs(np.log(t.flops / other.flops)) < np.log(APART) for other in targets[:i])
        symbol = SYMBOLS[(i + 1) % len(SYMBOLS)]
        common: Trace = {
            "type": "scatter",
            "mode": "markers",
            "legendgroup": t.name,
            "x": [round_(t.flops * APART**beside)],
            "hovertemplate": f"{_said(t)}<extra></extra>",
        }
        bar = {"type": "data", "symmetric": False, "color": INK, "thickness": 1.5, "width": 6}
        ends = {
            "array": [round_(t.loss.q95 - t.loss.median)],
            "arrayminus": [round_(t.loss.median - t.loss.q05)],
        }
        open_ = {"symbol": symbol, "size": 9, "color": "#fff", "line": {"color": INK, "width": 1.5}}
        median = {"y": [round_(t.loss.median)], "error_y": {**bar, **ends}, "marker": open_}
        traces.append({**common, "name": text(t.name), **median})
        if t.realised is not None:
            edge = {"color": "#fff", "width": 1}
            filled = {"symbol": symbol, "size": 11, "color": GREEN, "line": edge}
            came = {"y": [t.realised], "marker": filled, "showlegend": False}
            traces.append({**common, "name": f"{text(t.name)}, outcome", **came})
    return traces


def _said(t: Forecasted) -> str:
    said = f"{text(t.name)}, {t.flops:.3g} FLOPs<br>"
    said += f"{t.loss.median:.4f}, {t.loss.q05:.4f} to {t.loss.q95:.4f}"
    if t.realised is not None and t.error is not None:
        said += f"<br>came out at {t.realised:.4f}, off by {t.error:+.2%}"
    return said


def _table(found: Analysis) -> list[list[str]]:
    if not found.targets:
        return []
    head = ["run", "beyond the ladder", "median", "90 % interval", "came out", "error"]
    rows = [[*head, "rests on"]]
    for t in found.targets:
        sound = "" if not t.problems else f"; {plural(t.problems, 'problem')} in its register"
        rows.append(
            [
                t.name,
                f"{t.ratio:.3g} times",
                fixed(t.loss.median, 4),
                f"{t.loss.q05:.4f} to {t.loss.q95:.4f}",
                fixed(t.realised, 4),
                "" if t.error is None else f"{t.error:+.2%}{'' if t.inside else ' (outside)'}",
                ("these records" if t.from_here else "other records") + sound,
            ]
        )
    return rows


def _caption(found: Analysis, places: Sequence[Path]) -> str:
    flops = found.ladder.points.flops
    names = ", ".join(p.name or str(p) for p in places)
    said = (
        f"{plural(len(found.ladder.rows), 'run')} of {names}, {big(float(flops.min()), 'FLOP')} to "
        f"{big(float(flops.max()), 'FLOP')}."
    )
    if found.joint:
        said += " Experts vary, so that no single line is the law."
    if found.targets:
        said += (
            " Of each target the open mark is the median that was registered before its start, with"
            " its 90 % interval, and the filled one what came; equal ones are drawn side by side."
        )
    if found.holdouts:
        one = found.holdouts[0]
        said += (
            f" The largest rung, forecast from those below it ({one.ratio:.3g} times): off by "
            f"{percent(abs(one.error), 2)}, {'inside' if one.inside else 'outside'} the 90 %."
        )
    return said
