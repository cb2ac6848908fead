"""Figure 1, the loss with the fan of a forecast, and figure 2, how the forecasts narrowed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.report.plot import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SOFT,
    Figure,
    Trace,
    axis,
    layout,
    line,
    points,
    round_,
    text,
)
from jaxmoe.report.records import Forecast, Quantiles, Run, group, number
from jaxmoe.report.scores import Score
from jaxmoe.report.words import fixed, percent, side, step, tied

__all__ = ["losses", "narrowing", "verdict", "xz_nats"]

LOUD = (
    *("alarm", "crash", "rollback", "fallback", "preemption"),
    *("skip", "bad-steps", "corruption", "hang", "slow", "save-failed", "fault", "expert"),
)
NOTABLE = (*LOUD, "resume")
BANDS = (("90 %", "q05", "q95", 0.16, "dot"), ("50 %", "q25", "q75", 0.34, "solid"))
DIRECT = {"mode": "lines", "hoverinfo": "skip", "type": "scatter"}


def losses(run: Run, scores: Sequence[Score]) -> Figure:
    fans = [_fan(score) for score in scores]
    # A finished run is read for what its first forecast knew; a running one for the latest.
    first = 0 if run.outcome is not None else len(fans) - 1
    traces = [*_bands(fans[first : first + 1]), _train(run), *_heldout(run)]
    traces += [*_reference(run), *_median(fans[first : first + 1]), *_marks(run), *_outcome(run)]
    views = _views(run)
    return Figure(
        id="loss",
        title="Loss, and what was forecast",
        caption=_loss_caption(run),
        traces=traces,
        layout=layout(
            480,
            x=axis("step", range=views["Close-up"]["xaxis.range"]),
            yaxis=axis("loss, nats/token", range=views["Close-up"]["yaxis.range"]),
        ),
        extra={"fans": fans, "selected": first, "views": views},
    )


def narrowing(run: Run, scores: Sequence[Score]) -> Figure:
    title = "How the forecast narrowed"
    if not scores:
        return Figure(id="narrowing", title=title, caption="No forecast is registered yet.")
    end = max(score.forecast.target_step for score in scores)
    traces = [_bars(scores, low, high, name) for name, low, high, _, _ in BANDS]
    traces.append(_medians(scores))
    if run.outcome is not None:
        label = f"outcome, {run.outcome:.3f}"
        style = {"line": {"color": GREEN, "width": 2, "dash": "dash"}, "name": label}
        traces.append({**DIRECT, "x": [0, end], "y": [run.outcome] * 2, **style})
    return Figure(
        id="narrowing",
        title=title,
        caption=_narrowing_caption(run, scores),
        traces=traces,
        layout=layout(
            380,
            x=axis("step at which the forecast was registered", range=[0, end * 1.02]),
            yaxis=axis("final loss, nats/token"),
        ),
    )


def verdict(score: Score) -> str:
    """One forecast in a sentence."""
    forecast, loss = score.forecast, score.forecast.loss
    said = (
        f"Registered at step {step(forecast.cutoff_step)} ({percent(score.share)} of the run): "
        f"{loss.median:.3f} nats/token at step {step(forecast.target_step)}, "
        f"50 % within {_span(loss.q25, loss.q75)}, 90 % within {_span(loss.q05, loss.q95)}."
    )
    if score.error is None:
        return said
    inside = "inside the 50 % interval" if score.inside_50 else "outside the 50 % interval"
    if not score.inside_50:
        inside += ", inside the 90 % one" if score.inside_90 else " and the 90 % one"
    return f"{said} It was {side(score.error)}; the outcome lies {inside}."


def xz_nats(run: Run) -> float | None:
    """What xz -9 makes of the held-out text, in nats per token of this run's tokenizer."""
    bits = number(group(run.environment, "data"), "xz_bits_per_byte")
    for row in reversed(run.heldout):
        nll, own = number(row, "nll"), number(row, "bits_per_byte")
        if bits and nll and own:
            return bits * nll / own
    return None


def _fan(score: Score) -> dict[str, Any]:
    """What figure 1 draws of one forecast: trace meta -> columns."""
    forecast = score.forecast
    steps = [x for x, _ in forecast.path]
    medians = [round_(loss.median) for _, loss in forecast.path]
    marks: dict[str, Any] = {
        name: {"x": steps + steps[::-1], "y": _ring(forecast, low, high)}
        for name, low, high, _, _ in BANDS
    }
    hover = [_bounds(loss) for _, loss in forecast.path]
    marks["median"] = {"x": steps, "y": medians, "customdata": hover}
    label = f"step {step(forecast.cutoff_step)}"
    return {"marks": marks, "label": label, "law": forecast.law, "sentence": tied(verdict(score))}


def _ring(forecast: Forecast, low: str, high: str) -> list[float]:
    lower = [round_(getattr(loss, low)) for _, loss in forecast.path]
    upper = [round_(getattr(loss, high)) for _, loss in forecast.path]
    return lower + upper[::-1]


def _bands(fans: Sequence[dict[str, Any]]) -> list[Trace]:
    return [
        {
            **DIRECT,
            "meta": name,
            "name": f"forecast, {name}",
            "fill": "toself",
            "fillcolor": f"rgba(194,80,10,{opacity})",
            "line": {"color": ORANGE, "width": 0.8, "dash": dash},
            **fan["marks"][name],
        }
        for fan in fans
        for name, _, _, opacity, dash in BANDS
    ]


def _median(fans: Sequence[dict[str, Any]]) -> list[Trace]:
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "meta": "median",
            "name": "forecast, median",
            "line": {"color": ORANGE, "width": 2, "dash": "dash"},
            "hovertemplate": "%{y:.3f} nats/token<br>%{customdata}<br>step %{x:,}"
            "<extra>forecast</extra>",
            **fan["marks"]["median"],
        }
        for fan in fans
    ]


def _train(run: Run) -> Trace:
    key = "train/nll" if points(run.metrics, "train/nll") else "train/loss"
    style = {"color": "#a9b1bb", "width": 1}
    return line(points(run.metrics, key), "training", "%{y:.3f} nats/token", line=style)


def _heldout(run: Run) -> list[Trace]:
    """The first set, which the forecast is about, in ink; others thinner, each with its dash."""
    traces = []
    for i, (name, rows) in enumerate(run.evals.items()):
        style = (
            {"line": {"color": BLUE, "width": 2}, "marker": {"size": 5, "color": BLUE}}
            if i == 0
            else {"line": {"color": SOFT, "width": 1.5, "dash": ("dashdot", "longdash")[i % 2]}}
        )
        mode = "lines+markers" if i == 0 and len(rows) <= 80 else "lines"
        label = f"held-out: {text(name)}"
        trace = line(points(rows, "nll"), label, "%{y:.3f} nats/token", mode=mode, **style)
        bits = {row["step"]: fixed(number(row, "bits_per_byte")) for row in rows}
        trace["customdata"] = [
            f"{tokens}<br>{bits[x]} bits per byte"
            for x, tokens in zip(trace["x"], trace["customdata"], strict=True)
        ]
        traces.append(trace)
    return traces


def _reference(run: Run) -> list[Trace]:
    level = xz_nats(run)
    if level is None:
        return []
    x = [(run.metrics or run.heldout)[0]["step"], run.target_step or run.step]
    style = {"color": SOFT, "width": 1.2, "dash": "dot"}
    return [{**DIRECT, "name": "xz -9", "x": x, "y": [round_(level)] * 2, "line": style}]


def _marks(run: Run) -> list[Trace]:
    """Events that interrupt a run, as triangles on the curve."""
    curve = points(run.heldout, "nll") or points(run.metrics, "train/nll")
    rows = [row for row in run.events if row.get("what") in NOTABLE]
    rows = [row for row in rows if number(row, "step") is not None]
    if not curve or not rows:
        return []
    xs, ys, _ = zip(*curve, strict=True)
    hover = [f"{text(row['what'])}<br>{text(row.get('why') or '')}" for row in rows]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "alarms, resumes",
            "x": [row["step"] for row in rows],
            "y": [round_(np.interp(row["step"], xs, ys)) for row in rows],
            "text": hover,
            "hovertemplate": "%{text}<br>step %{x:,}<extra></extra>",
            "marker": {"symbol": "triangle-up", "size": 10, "color": INK},
        }
    ]


def _outcome(run: Run) -> list[Trace]:
    if run.outcome is None:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "outcome",
            "x": [run.target_step or run.step],
            "y": [run.outcome],
            "hovertemplate": "%{y:.4f} nats/token<br>step %{x:,}<extra>outcome</extra>",
            "marker": {
                "symbol": "diamond",
                "size": 13,
                "color": GREEN,
                "line": {"color": "#fff", "width": 1.5},
            },
        }
    ]


def _views(run: Run) -> dict[str, dict[str, Any]]:
    """Ranges of the axes. The close-up leaves out the first fall, which dwarfs any fan."""
    train = points(run.metrics, "train/nll") or points(run.metrics, "train/loss")
    held = points(run.heldout, "nll")
    end = max([run.step, run.target_step or 0, *(f.target_step for f in run.forecasts)])
    late = [y for x, y, _ in held or train if x >= 0.08 * run.step]
    fans = [q for f in run.forecasts for _, loss in f.path for q in (loss.q05, loss.q95)]
    close = [*late, *fans] or [y for _, y, _ in train] or [0.0, 1.0]
    every = [y for _, y, _ in [*train, *held]] + close
    begin = max(1.0, min(x for x, _, _ in [*train, (1.0, 0.0, None)] if x > 0))
    whole = _padded(min(every), max(every))
    logs = {
        "xaxis.type": "log",
        "xaxis.range": [math.log10(begin), math.log10(max(end, begin + 1)) + 0.02],
    }
    linear = {"xaxis.type": "linear", "xaxis.range": [0, end * 1.02]}
    return {
        "Close-up": {**linear, "yaxis.range": _padded(min(close), max(close))},
        "Whole run": {**linear, "yaxis.range": whole},
        "Log steps": {**logs, "yaxis.range": whole},
    }


def _padded(low: float, high: float) -> list[float]:
    pad = 0.06 * (high - low) or 0.05
    return [round_(low - pad), round_(high + pad)]


def _bars(scores: Sequence[Score], low: str, high: str, name: str) -> Trace:
    """Upright bars as one broken line: unlike error bars, the legend can show it."""
    bounds = [(getattr(s.forecast.loss, low), getattr(s.forecast.loss, high)) for s in scores]
    heavy = name == "50 %"
    return {
        **DIRECT,
        "name": f"{name} interval",
        "x": [x for s in scores for x in (s.forecast.cutoff_step, s.forecast.cutoff_step, None)],
        "y": [y for below, above in bounds for y in (round_(below), round_(above), None)],
        "line": {"color": ORANGE if heavy else "#e0a070", "width": 7 if heavy else 2},
    }


def _medians(scores: Sequence[Score]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "median",
        "x": [score.forecast.cutoff_step for score in scores],
        "y": [round_(score.forecast.loss.median) for score in scores],
        "customdata": [_hover(score) for score in scores],
        "hovertemplate": "%{y:.4f} nats/token<br>%{customdata}<extra></extra>",
        "marker": {"size": 9, "color": "#fff", "line": {"color": INK, "width": 2}},
    }


def _hover(score: Score) -> str:
    error = "" if score.error is None else f"<br>{side(score.error)}"
    registered = f"registered at step {step(score.forecast.cutoff_step)}"
    law = f", {text(score.forecast.law)}" if score.forecast.law else ""
    return f"{_bounds(score.forecast.loss)}{error}<br>{registered}{law}"


def _bounds(loss: Quantiles) -> str:
    return f"50 %: {_span(loss.q25, loss.q75)}<br>90 %: {_span(loss.q05, loss.q95)}"


def _span(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _loss_caption(run: Run) -> str:
    held = points(run.heldout, "nll")
    if not held:
        return "No held-out result yet; the grey line is the training loss of single batches."
    (x0, y0, _), (x1, y1, _) = held[0], held[-1]
    fell = "fell" if y1 <= y0 else "rose"
    said = (
        f"The held-out loss {fell} from {y0:.3f} nats/token at step {step(x0)} "
        f"to {y1:.3f} at step {step(x1)}."
    )
    level = xz_nats(run)
    passed = next((x for x, y, _ in held if level is not None and y < level), None)
    if passed is not None:
        said += f" It passed the level of xz -9 by step {step(passed)}."
    return said


def _narrowing_caption(run: Run, scores: Sequence[Score]) -> str:
    first, last = scores[0].forecast, scores[-1].forecast
    widths = [f.loss.q95 - f.loss.q05 for f in (first, last)]
    said = (
        f"{len(scores)} forecasts. The 90 % interval went from {widths[0]:.3f} nats/token wide "
        f"at step {step(first.cutoff_step)} to {widths[1]:.3f} at step {step(last.cutoff_step)}."
        if len(scores) > 1
        else f"One forecast; its 90 % interval is {widths[0]:.3f} nats/token wide."
    )
    if run.outcome is None:
        return f"{said} The outcome is not known yet."
    half, most = (sum(map(bool, kind)) for kind in zip(*map(_judged, scores), strict=True))
    return (
        f"{said} The outcome, {run.outcome:.3f}, lies inside {half} of {len(scores)} intervals "
        f"of 50 % and {most} of {len(scores)} of 90 %; being of one run, they are not independent."
    )


def _judged(score: Score) -> tuple[bool | None, bool | None]:
    return score.inside_50, score.inside_90
