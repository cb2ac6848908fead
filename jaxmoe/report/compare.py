"""The page of several runs side by side."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.report import calibration, heat, overlay, page, spent, words
from jaxmoe.report.overlay import Shown
from jaxmoe.report.progress import Progress
from jaxmoe.report.records import Row, Run, number, read
from jaxmoe.report.style import LIMIT, style

__all__ = ["differences", "render", "shown", "write"]

ABSENT = words.DASH


def write(runs: Sequence[Path], out: Path, ladders: Sequence[Path] = ()) -> Path:
    """Writes one page about several run directories, and returns where.

    Raises:
        UserError: there is no such run, one has no metrics yet, a record is damaged, or there are
            too many to tell apart.
    """
    return page.replaced(out, render(shown([read(run) for run in runs]), ladders))


def shown(runs: Sequence[Run]) -> list[Shown]:
    """Each with a style, and a label that no other has."""
    if len(runs) > LIMIT:
        raise UserError(f"{len(runs)} runs: lines of more than {LIMIT} cannot be told apart")
    paths = Counter(run.path.resolve() for run in runs)
    for path, count in paths.items():
        if count > 1:
            raise UserError(f"{path} is named {count} times; give each run once")
    names = Counter(run.name for run in runs)
    folders = Counter((run.name, run.path.resolve().name) for run in runs)
    labels = []
    for run in runs:
        folder = run.path.resolve()
        where = folder.name if folders[(run.name, folder.name)] == 1 else str(folder)
        labels.append(run.name if names[run.name] == 1 else f"{run.name} ({where})")
    return [
        Shown(run=run, label=label, style=style(i), progress=Progress(run))
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]


def render(runs: Sequence[Shown], ladders: Sequence[Path] = ()) -> str:
    named = [(one.label, one.run) for one in runs]
    found = calibration.past(named)
    figures = [
        overlay.losses(runs),
        calibration.errors(found),
        calibration.calibrated(found),
        heat.loads(runs),
        overlay.speeds(runs),
        spent.goodput(named),
    ]
    if ladders:
        from jaxmoe.report.rungs import fitted  # fits: seconds, and only where it is asked for

        figures.append(fitted(ladders, [one.run for one in runs]))
    labels = [one.label for one in runs]
    return page.filled(
        "compare.html.j2",
        figures,
        runs=runs,
        title=" | ".join(labels) if len(labels) < 4 else f"{len(labels)} runs",
        head=["run", "progress", "tokens", "parameters", "bits/byte", "nats/token", *HEAD],
        rows=[_row(one) for one in runs],
        found=found,
        config=[["setting", *labels], *differences([one.run.config for one in runs])],
        settings=sum(len(words.flat(one.run.config)) for one in runs[:1]),
        environment=[["", *labels], *differences([one.run.environment for one in runs])],
    )


HEAD = ("forecast", "90 % interval", "goodput")


def differences(trees: Sequence[Row]) -> list[list[str]]:
    """(dotted key, the value in each tree) of the leaves that are not the same in all."""
    flat = [dict(words.flat(tree)) for tree in trees]
    keys = dict.fromkeys(key for one in flat for key in one)
    # A group that is a single value elsewhere (none, say): one row tells where it is set, and its
    # leaves are told only where they differ among those that have them.
    groups = [key for key in keys if any(other.startswith(f"{key}.") for other in keys)]
    for one in flat:
        one |= {g: "set" for g in groups if any(key.startswith(f"{g}.") for key in one)}
    rows = []
    for key in keys:
        inner = any(key.startswith(f"{g}.") for g in groups)
        values = [one.get(key) for one in flat]
        told = {value for value in values if value is not None or not inner}
        if len(told) > 1:
            rows.append([key, *(ABSENT if value is None else value for value in values)])
    return rows


def _progress(run: Run) -> str:
    steps = run.target_step
    if run.outcome is not None or any(row.get("what") == "done" for row in run.events):
        return f"ended, {words.step(run.step)} steps"
    if steps is None:
        return f"step {words.step(run.step)}"
    return f"{words.percent(run.step / steps)} of {words.step(steps)} steps"


def _row(one: Shown) -> dict[str, Any]:
    run, last = one.run, one.run.heldout[-1] if one.run.heldout else {}
    nll = number(last, "nll") if run.outcome is None else run.outcome
    forecast = one.forecast
    loss = None if forecast is None else forecast.loss
    return {
        "key": one.style.svg(),
        "label": one.label,
        "cells": [
            _progress(run),
            words.big(number(run.last, "tokens")),
            words.big(number(run.environment, "params")),
            words.fixed(number(last, "bits_per_byte"), 4),
            words.fixed(nll, 4),
            words.fixed(loss and loss.median, 4),
            ABSENT if loss is None else f"{words.fixed(loss.q05)} to {words.fixed(loss.q95)}",
            words.percent(run.spent and run.spent.goodput, 1),
        ],
    }
