"""`python -m jaxmoe.forecast score RUN...`: tables, JSON and a picture of registered forecasts."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.picture import check_picture, write_picture
from jaxmoe.forecast.score import BINS, Score, Summary, score, summarise
from jaxmoe.outside import reading

__all__ = ["show_scores"]

Scored = list[tuple[str, Score]]


def show_scores(
    runs: Sequence[Path], *, as_json: bool, picture: Path | None, console: Console
) -> int:
    """Scores the registers of run directories, prints them, and draws them if asked.

    Raises:
        UserError: no register, a damaged one, no outcome yet, or a picture that cannot be drawn.
    """
    if picture is not None:
        check_picture(picture)  # before the work, not after it
    scores: Scored = [(str(run), s) for run in runs for s in _of(run)]
    names = [name for name, _ in scores]
    plain = [s for _, s in scores]
    if not plain:
        raise UserError(f"{runs[0]}: its register holds an outcome but no forecast")
    leads = summarise(plain, runs=names)
    (whole,) = summarise(plain, (0.0, BINS[-1] + 1), runs=names)
    if picture is not None:
        write_picture(picture, scores)
    if as_json:
        rows = [{"run": run, **dataclasses.asdict(s)} for run, s in scores]
        summary = [dataclasses.asdict(s) for s in leads]
        print(json.dumps({"scores": rows, "summary": summary, "all": dataclasses.asdict(whole)}))
        return 0
    console.print(_table(scores))
    console.print(_leads([*leads, whole]))
    if picture is not None:
        console.print(f"drawn: {picture}")
    return 0


def _of(run: Path) -> list[Score]:
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    path = run / "forecasts.jsonl"
    problems = register.verify(path)
    if problems:
        raise UserError(f"{run}: not scoring a damaged register: {problems[0]}")
    try:
        with reading("its register"):
            return score(register.read(path))
    except UserError as error:
        raise UserError(f"{run}: {error}") from None


def _table(scores: Scored) -> Table:
    head = ("run", "seen", "median", "realised", "error", "in 50, 80, 90 %")
    table = Table(*head, "width 90 %", "pinball", "CRPS", title="forecasts")
    for run, s in scores:
        hits = ", ".join("yes" if hit else "no" for hit in (s.inside50, s.inside80, s.inside90))
        numbers = (f"{s.median:.4f}", f"{s.realised:.4f}", f"{s.error:+.2%}")
        rest = (f"{s.width90:.2%}", f"{s.pinball:.4f}", f"{s.crps:.4f}")
        table.add_row(run, _seen(s.seen), *numbers, hits, *rest)
    return table


def _leads(rows: Sequence[Summary]) -> Table:
    head = ("seen", "forecasts", "runs", "|error|", "covered by 50, 80, 90 %")
    table = Table(*head, "widths (medians)", "pinball", "CRPS", title="by lead, then all")
    for row in rows:
        covered = (row.coverage50, row.coverage80, row.coverage90)
        widths = (row.width50, row.width80, row.width90)
        table.add_row(
            "all" if row.high > BINS[-1] else _bin(row),
            str(row.count),
            str(row.runs),
            f"{row.absolute_error:.2%}",
            ", ".join(f"{share:.0%}" for share in covered),
            ", ".join(f"{width:.2%}" for width in widths),
            f"{row.pinball:.4f}",
            f"{row.crps:.4f}",
        )
    return table


def _bin(row: Summary) -> str:
    if row.high == BINS[1]:
        return "before the start"
    return f"{row.low:.0%} to {row.high:.0%}"


def _seen(share: float) -> str:
    return "none" if share == 0 else f"{share:.0%}"
