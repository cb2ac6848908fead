"""`python -m jaxmoe.forecast score --benchmark`: the table, with a progress bar."""

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxmoe.forecast.benchmark import Report, run_benchmark

__all__ = ["show_benchmark"]


def show_benchmark(folder: Path, *, as_json: bool, console: Console) -> int:
    """Runs the benchmark on the data in `folder` and prints its report."""
    bars = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(file=sys.stderr), transient=True) as progress:
        ids: dict[str, TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in ids:
                ids[name] = progress.add_task(name, total=total)
            progress.update(ids[name], completed=done)

        report = run_benchmark(folder, advance)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), allow_nan=False))
    else:
        _print(report, console)
    return 0


def _print(report: Report, console: Console) -> None:
    head = ("item", "case", "n", "baseline", "wanted", "measured", "met")
    table = Table(*head, title="forecasts of public runs: errors and coverages in per cent")
    for row in report.rows:
        met = {True: "yes", False: "NO", None: "-"}[row.met]
        cells = (row.item, row.case, str(row.count), row.baseline, row.wanted, row.measured, met)
        table.add_row(*cells)
    console.print(table)
    sets = Table("item", "case", "by set", title="by set")
    for row in report.rows:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row.by_set.items())
        sets.add_row(row.item, row.case, parts)
    console.print(sets)
    tuned = Table("tuned", "left out", "value", title="tuned by cross-validation across sets")
    for title, values in report.tuned.items():
        groups: dict[str, list[str]] = {}
        for left_out, value in values.items():
            groups.setdefault(", ".join(f"{v:g}" for v in value), []).append(left_out)
        for value, names in groups.items():
            tuned.add_row(title, ", ".join(names), value)
    console.print(tuned)
