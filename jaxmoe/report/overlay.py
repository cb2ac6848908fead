"""Figures of several runs over each other: the loss with fans and alarms, the speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from jaxmoe.report.loss import LOUD
from jaxmoe.report.plot import Figure, Trace, axis, envelope, layout, points, round_, text
from jaxmoe.report.progress import AXES, Progress
from jaxmoe.report.records import Forecast, Run
from jaxmoe.report.style import Style
from jaxmoe.report.words import big, fixed, percent, step

__all__ = ["Shown", "losses", "speeds"]

LATE = 0.12  # of the run's steps: from here on a loss is in the close-up
MARKERS = 14  # on a line: enough to tell it by, few enough to see it


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run of a page of several; its label is no other's."""

    run: Run
    label: str
    style: Style
    progress: Progress

    @property
    def curve(self) -> list[tuple[float, float, float | None]]:
        """Held-out, or of single batches where it was never evaluated; nats per token."""
        own = points(self.run.heldout, "nll")
        return envelope(own or points(self.run.metrics, "train/nll"))

    @property
    def forecast(self) -> Forecast | None:
        """What a finished run knew first, and a running one last."""
        known = self.run.forecasts
        return (known[0] if self.run.outcome is not None else known[-1]) if known else None


class _Drawn:
    """Traces with the steps of their points, of which any axis is made."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.steps: list[tuple[Shown, list[float]]] = []

    def add(self, shown: Shown, steps: Sequence[float], trace: Trace) -> None:
        self.traces.append({"type": "scatter", "legendgroup": shown.label, **trace})
        self.steps.append((shown, [*steps]))

    def axes(self) -> dict[str, dict[str, Any]]:
        """kind -> title and the x of every trace; kinds that no run knows are left out."""
        found = {}
        for kind, title in AXES.items():
            if any(shown.progress.known(kind) for shown, _ in self.steps):
                xs = [shown.progress.at(kind, steps) for shown, steps in self.steps]
                found[kind] = {"title": title, "x": xs}
        return found


def losses(runs: Sequence[Shown]) -> Figure:
    """The loss of each with its fan, over tokens at first."""
    drawn = _Drawn()
    for shown in runs:
        _fan(drawn, shown)
    for shown in runs:
        _curve(drawn, shown)
    for shown in runs:
        _marks(drawn, shown)
        _outcome(drawn, shown)
    axes = drawn.axes()
    kind = next(iter(axes))
    for trace, x in zip(drawn.traces, axes[kind]["x"], strict=True):
        trace["x"] = x
    views = _views(runs)
    return Figure(
        id="loss",
        title="Held-out loss, and what was forecast",
        caption=_loss_caption(runs),
        traces=drawn.traces,
        layout=layout(
            500,
            x=axis(AXES[kind]),
            yaxis=axis("held-out loss, nats/token", range=views["Close-up"]["yaxis.range"]),
        ),
        extra={"views": views, "axes": axes},
    )


def speeds(runs: Sequence[Shown]) -> Figure:
    """Tokens a second and MFU, over the share of the run."""
    title, drawn = "Speed", _Drawn()
    panels = (("perf/tokens_per_second", "y", "%{y:.4s} tokens/s"), ("perf/mfu", "y2", "%{y:.1%}"))
    for shown in runs:
        for key, yaxis, hover in panels:
            values = envelope(points(shown.run.metrics, key))
            if values:
                trace = _line(shown, [y for _, y, _ in values], hover)
                own = {"yaxis": yaxis, "showlegend": yaxis == "y"}
                drawn.add(shown, [x for x, _, _ in values], {**trace, **own})
    if not drawn.traces:
        return Figure(id="speed", title=title, caption="No speed is logged of any of them.")
    for trace, (shown, steps) in zip(drawn.traces, drawn.steps, strict=True):
        trace["x"] = shown.progress.at("share", steps)
    return Figure(
        id="speed",
        title=title,
        caption=_speed_caption(runs),
        traces=drawn.traces,
        layout=layout(
            440,
            x=axis(AXES["share"], anchor="y2"),
            yaxis=axis("tokens/s", rangemode="tozero", tickformat="~s", nticks=5, domain=[0.55, 1]),
            yaxis2=axis("MFU", rangemode="tozero", tickformat="~%", nticks=5, domain=[0, 0.45]),
        ),
    )


def _line(shown: Shown, values: Sequence[float], hover: str, **more: Any) -> Trace:
    return {
        "mode": "lines+markers",
        "name": text(shown.label),
        "y": [round_(y) for y in values],
        "line": shown.style.line(),
        "marker": {**shown.style.marker(), "maxdisplayed": MARKERS},
        "hovertemplate": f"{hover}<extra>{text(shown.label)}</extra>",
        **more,
    }


def _curve(drawn: _Drawn, shown: Shown) -> None:
    steps = [x for x, _, _ in shown.curve]
    hover = "%{y:.4f} nats/token<br>%{customdata}"
    said = [f"step {step(x)}, {big(tokens)} tokens" for x, _, tokens in shown.curve]
    drawn.add(shown, steps, _line(shown, [y for _, y, _ in shown.curve], hover, customdata=said))


def _fan(drawn: _Drawn, shown: Shown) -> None:
    """The 90 % interval as a faint surface with the run's own edge, and the median, thinner."""
    forecast = shown.forecast
    if forecast is None:
        return
    steps = [x for x, _ in forecast.path]
    low, middle, high = (
        [round_(getattr(q, name)) for _, q in forecast.path] for name in ("q05", "median", "q95")
    )
    common = {"name": "forecast", "mode": "lines", "showlegend": False, "hoverinfo": "skip"}
    edge = {"fill": "toself", "fillcolor": "rgba(91,99,109,0.12)", "line": shown.style.line(0.8)}
    if len(steps) == 1:  # only the end is forecast
        bar = {**common, "y": [low[0], high[0]], "line": {**shown.style.line(2), "dash": "solid"}}
        drawn.add(shown, steps * 2, {**bar, "meta": "fan"})
        return
    drawn.add(shown, steps + steps[::-1], {**common, **edge, "y": low + high[::-1], "meta": "fan"})
    drawn.add(shown, steps, {**common, "y": middle, "line": shown.style.line(1.2)})


def _marks(drawn: _Drawn, shown: Shown) -> None:
    curve = shown.curve
    found = [r for r in shown.run.events if r.get("what") in LOUD and r.get("step") is not None]
    if not found or not curve:
        return
    xs, ys, _ = zip(*curve, strict=True)
    steps = [float(row["step"]) for row in found]
    drawn.add(
        shown,
        steps,
        {
            "mode": "markers",
            "name": "alarms",
            "showlegend": False,
            "y": [round_(float(np.interp(x, xs, ys))) for x in steps],
            "text": [f"{text(row['what'])}: {text(row.get('why') or '')[:160]}" for row in found],
            "hovertemplate": f"%{{text}}<extra>{text(shown.label)}</extra>",
            "marker": {"symbol": "triangle-up", "size": 9, "color": shown.style.colour},
        },
    )


def _outcome(drawn: _Drawn, shown: Shown) -> None:
    if shown.run.outcome is None:
        return
    marker = {**shown.style.marker(13), "color": shown.style.colour}
    said = f"%{{y:.4f}} nats/token<extra>{text(shown.label)}, outcome</extra>"
    trace = {"mode": "markers", "name": "outcome", "showlegend": False, "hovertemplate": said}
    at = [shown.run.target_step or shown.run.step]
    drawn.add(shown, at, {**trace, "y": [shown.run.outcome], "marker": {**marker, "line": EDGE}})


EDGE = {"color": "#fff", "width": 1.5}


def _views(runs: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """The close-up leaves out the first fall, and how wide a fan begins: either dwarfs any
    difference at the end."""
    late = [y for s in runs for x, y, _ in s.curve if x >= LATE * (s.run.target_step or s.run.step)]
    ends = [q for s in runs if s.forecast for q in (s.forecast.loss.q05, s.forecast.loss.q95)]
    fans = [q for s in runs if s.forecast for _, at in s.forecast.path for q in (at.q05, at.q95)]
    every = [y for s in runs for _, y, _ in s.curve] + fans
    return {
        "Close-up": {"yaxis.range": _padded([*late, *ends] or every)},
        "Whole run": {"yaxis.range": _padded(every)},
    }


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05
    return [round_(low - pad), round_(high + pad)]


def _loss_caption(runs: Sequence[Shown]) -> str:
    said = []
    for shown in runs:
        if not shown.curve:
            continue
        end = f"{shown.label} stands at {shown.curve[-1][1]:.4f} nats/token"
        if shown.run.outcome is not None:
            end = f"{shown.label} came out at {shown.run.outcome:.4f} nats/token"
        if shown.forecast is not None:
            loss = shown.forecast.loss
            at = step(shown.forecast.cutoff_step)
            end += f" (forecast at step {at}: {fixed(loss.median, 4)}, 90 % {fixed(loss.q05)} to"
            end += f" {fixed(loss.q95)})"
        said.append(end + ".")
    return " ".join(said) + (
        " Grey surfaces are the 90 % intervals of the first forecast of a run that has ended and of"
        " the latest of one that goes on; solid triangles are alarms and what interrupts a run."
    )


def _speed_caption(runs: Sequence[Shown]) -> str:
    said = []
    for shown in runs:
        rate = [y for _, y, _ in points(shown.run.metrics, "perf/tokens_per_second")]
        mfu = [y for _, y, _ in points(shown.run.metrics, "perf/mfu")]
        wait = [y for _, y, _ in points(shown.run.metrics, "perf/data_wait")]
        if rate:
            more = f", MFU {percent(median(mfu), 1)}" if mfu else ""
            more += f", {percent(median(wait), 1)} of it drawing batches" if wait else ""
            said.append(f"{shown.label}: {big(median(rate))} tokens/s{more}.")
    return f"Medians. {' '.join(said)}"
