"""Where the time of runs went: a bar each, from productive steps to the time between two starts."""

from collections.abc import Sequence

from jaxmoe.report.plot import INK, LEGEND, SOFT, Figure, Trace, axis, layout, round_, text
from jaxmoe.report.records import Run, number
from jaxmoe.report.words import DASH, percent, plural, seconds
from jaxmoe.run.goodput import BUCKETS

__all__ = ["goodput"]

# Ground and pattern of each bucket: no two have one pattern on grounds that print as alike a grey.
LOOKS = {
    "steps": ("#1b5e9b", ""),
    "undone": ("#ffffff", "x"),
    "data": ("#e8924a", ""),
    "evaluation": ("#dbe7f3", ""),
    "checkpoint": ("#cfd4da", "/"),
    "compile": ("#f6dcc4", "."),
    "restore": ("#b9bfc8", "|"),
    "startup": ("#ffffff", "\\"),
    "other": ("#e4e6ea", "-"),
    "down": ("#1f2328", ""),
}
ROW = 56  # pixels of a bar
TOP = 84  # pixels for two rows of the legend, under the buttons


def goodput(runs: Sequence[tuple[str, Run]]) -> Figure:
    """Of (label, run): shares of the time from the first start to the last line."""
    title = "Where the time went"
    known = [(name, run.spent) for name, run in runs if run.spent is not None and run.spent.seconds]
    if not known:
        return Figure(id="goodput", title=title, caption=_unknown(runs))
    used = [key for key in BUCKETS if any(key in spent.spent for _, spent in known)]
    names = [text(name) for name, _ in known]
    return Figure(
        id="goodput",
        title=title,
        caption=_caption(runs),
        traces=[_bar(key, names, [spent for _, spent in known]) for key in used],
        layout=layout(
            TOP + 48 + ROW * len(known),
            x=axis("share of the time, %", range=[0, 100], showgrid=True),
            yaxis={"autorange": "reversed", "automargin": True, "showticklabels": len(known) > 1},
            barmode="stack",
            margin={
                "l": 56,
                "r": 16,
                "t": TOP,
                "b": 48,
            },  # the legend is under the modebar's buttons
            legend={**LEGEND, "traceorder": "normal"},
            bargap=0.3,
        ),
        table=_table([(name, run) for name, run in runs if run.spent is not None], used),
    )


def _bar(key: str, names: list[str], spent: Sequence) -> Trace:
    shade, pattern = LOOKS[key]
    shares = [{k: (s, share) for k, _, s, share in one.shares()}.get(key, (0, 0)) for one in spent]
    return {
        "type": "bar",
        "orientation": "h",
        "name": BUCKETS[key],
        "y": names,
        "x": [round_(100 * share) for _, share in shares],
        "customdata": [seconds(s) for s, _ in shares],
        "hovertemplate": f"%{{x:.1f}} %, %{{customdata}}<extra>{BUCKETS[key]}</extra>",
        "marker": {
            "color": shade,
            "line": {"color": INK, "width": 0.8},
            "pattern": {
                "shape": pattern,
                "size": 6,
                "solidity": 0.2,
                "fgcolor": SOFT,
                "bgcolor": shade,
            },
        },
    }


def _table(runs: Sequence[tuple[str, Run]], used: Sequence[str]) -> list[list[str]]:
    """A head, and a row for each bucket; a column for each run."""
    rows = [["", *(name for name, _ in runs)]]
    for key in used:
        cells = []
        for _, run in runs:
            own = {k: (s, share) for k, _, s, share in run.spent.shares()} if run.spent else {}
            s, share = own.get(key, (None, None))
            cells.append(DASH if s is None else f"{seconds(s)}, {percent(share, 1)}")
        rows.append([BUCKETS[key], *cells])
    rows.append(["in all", *(seconds(run.spent.seconds if run.spent else None) for _, run in runs)])
    rows.append(["starts", *(str(run.spent.starts if run.spent else DASH) for _, run in runs)])
    return rows


def _caption(runs: Sequence[tuple[str, Run]]) -> str:
    said = []
    for name, run in runs:
        spent = run.spent
        if spent is None:
            continue
        whose = f"{name}: " if len(runs) > 1 else ""
        lost = f"; {plural(spent.undone, 'step')} undone" if spent.undone else ""
        said.append(
            f"{whose}{percent(spent.goodput, 1)} of {seconds(spent.seconds)} in productive steps, "
            f"{plural(spent.starts, 'start')}{lost}."
        )
    without = [name for name, run in runs if run.spent is None]
    if without:
        said.append(f"Nobody wrote it down for {', '.join(without)}.")
    return " ".join(said)


def _unknown(runs: Sequence[tuple[str, Run]]) -> str:
    """What events and metrics tell of a run from before there was a ledger."""
    said = ["No ledger of the time (goodput.jsonl)."]
    for name, run in runs:
        trained = number(run.last, "seconds")
        starts = sum(row.get("what") in ("start", "resume") for row in run.events)
        whose = f" {name}:" if len(runs) > 1 else ""
        if starts:
            known = f", {seconds(trained)} of training" if trained is not None else ""
            said.append(f"{whose} {plural(starts, 'start')}{known}.".strip())
    return " ".join(said)
