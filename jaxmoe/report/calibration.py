"""Past forecasts of several runs against what came, and how well their intervals are calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxmoe.errors import UserError
from jaxmoe.forecast import picture
from jaxmoe.forecast.score import BINS, Score, Summary, score, summarise
from jaxmoe.report.plot import Figure, axis, layout
from jaxmoe.report.records import Run
from jaxmoe.report.words import percent, plural

__all__ = ["Past", "calibrated", "errors", "past"]

NEEDED = ("index", "law", "cutoff_tokens", "target_tokens", "set_fingerprint")


@dataclass(frozen=True, kw_only=True)
class Past:
    """Attributes:
    scores: (run, forecast against its outcome); rows: a summary of each lead, and of all.
    without: runs that have no outcome, or whose register cannot be scored, and why.
    """

    scores: list[tuple[str, Score]] = field(default_factory=list)
    rows: list[Summary] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    @property
    def table(self) -> list[list[str]]:
        head = ["of the run seen", "forecasts", "runs", "error, absolute", "in 50 %", "in 80 %"]
        return [
            [*head, "in 90 %", "90 % width", "CRPS"],
            *(
                [
                    _lead(row),
                    str(row.count),
                    str(row.runs),
                    percent(row.absolute_error, 2),
                    *(percent(x) for x in (row.coverage50, row.coverage80, row.coverage90)),
                    percent(row.width90, 1),
                    f"{row.crps:.4f}",
                ]
                for row in self.rows
            ),
        ]


def past(runs: Sequence[tuple[str, Run]]) -> Past:
    """Of (label, run)."""
    scores, without = [], []
    for name, run in runs:
        try:
            scores += [(name, one) for one in _scored(run)]
        except UserError as error:
            without.append(f"{name}: {error}")
    if not scores:
        return Past(without=without)
    names, plain = [name for name, _ in scores], [one for _, one in scores]
    rows = summarise(plain, runs=names)
    if len(rows) > 1:
        rows += summarise(plain, (0.0, BINS[-1] + 1), runs=names)
    return Past(scores=scores, rows=rows, without=without)


def errors(found: Past) -> Figure:
    title = "Past forecasts against what came"
    if not found.scores:
        said = "No run with a forecast has ended yet."
        return Figure(id="errors", title=title, caption=said)
    first: dict[str, Score] = {}
    for name, one in found.scores:
        first.setdefault(name, one)
    said = " ".join(
        f"{name}: {plural(sum(n == name for n, _ in found.scores), 'forecast')}, the first "
        f"{_off(one)} ({'inside' if one.inside90 else 'outside'} its 90 % interval)."
        for name, one in first.items()
    )
    traces = [one for one in picture.figure(found.scores)["data"] if "xaxis" not in one]
    return Figure(
        id="errors",
        title=title,
        caption=f"{said} Above zero the run did better than forecast.",
        traces=traces,
        layout=layout(
            400,
            x=axis("share of the run seen, %", range=[-3, 103]),
            yaxis=axis("forecast over outcome, %"),
        ),
    )


def calibrated(found: Past) -> Figure:
    title = "Calibration"
    if not found.scores:
        return Figure(id="calibration", title=title, caption="Nothing to compare yet.")
    traces = [
        {k: v for k, v in one.items() if k not in ("xaxis", "yaxis")}
        for one in picture.figure(found.scores)["data"]
        if "xaxis" in one
    ]
    whole = found.rows[-1]
    count = len({name for name, _ in found.scores})
    return Figure(
        id="calibration",
        title=title,
        caption=(
            f"Intervals of 50, 80 and 90 % held {percent(whole.coverage50)}, "
            f"{percent(whole.coverage80)} and {percent(whole.coverage90)} of the outcomes, over "
            f"{plural(whole.count, 'forecast')} of {plural(count, 'run')}. Forecasts of one run "
            "share its outcome: the grey band is where chance alone puts as many calibrated runs."
        ),
        traces=traces,
        layout=layout(
            400,
            x=axis("level of the forecast, %", range=[0, 100]),
            yaxis=axis("outcomes below it, %", range=[-2, 102]),
        ),
    )


def _scored(run: Run) -> list[Score]:
    forecasts = [row for row in run.register if row.get("kind") == "forecast"]
    if not forecasts:
        raise UserError("no forecast is registered")
    if not all(key in row for row in forecasts for key in NEEDED):
        raise UserError(f"its register lacks one of {', '.join(NEEDED)}")
    return score([row for row in run.register if row.get("kind") in ("forecast", "outcome")])


def _lead(row: Summary) -> str:
    if row.high > BINS[-1]:
        return "all"
    return "before the start" if row.high == BINS[1] else f"{row.low:.0%} to {row.high:.0%}"


def _off(one: Score) -> str:
    return f"{100 * abs(one.error):.2f} % too {'high' if one.error > 0 else 'low'}"
