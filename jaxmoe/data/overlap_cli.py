"""`python -m jaxmoe.data overlap`: held-out sets against training sources."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmoe.data.bars import bars
from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.data.heldout_sets import locked, remove
from jaxmoe.data.overlap import Limits, scan, to_drop
from jaxmoe.data.windows import COMMON, SIZE
from jaxmoe.errors import UserError

__all__ = ["add_parser", "run"]

_EXAMPLES = """examples:
  python -m jaxmoe.data overlap DATASET                    every set against every source: report
  python -m jaxmoe.data overlap DATASET --drop             and remove the documents that leak
  python -m jaxmoe.data overlap DATASET --set wiki --method ngram13 --json

A document leaks if it shares more than --limit-windows windows with a set (1,000; of words 200), or
more than --limit-share (0.2) of its own, or of those of one held-out document. Windows in --common
held-out documents or more are licence headers, and are not looked for.
"""
_Rows = dict[str, dict[str, dict[str, Any]]]  # by set, by source


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "overlap",
        help="compare held-out sets with the training sources",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="the folder of a data set")
    parser.add_argument("--set", action="append", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="default: all"
    )
    parser.add_argument("--method", choices=sorted(SIZE), default="chars50")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="only record and show it (default)")
    what.add_argument("--drop", action="store_true", help="remove the documents that leak")
    parser.add_argument("--limit-windows", type=int, metavar="N")
    parser.add_argument("--limit-share", type=float, metavar="X")
    parser.add_argument("--common", type=int, default=COMMON, metavar="N", help="0: look for all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.set_defaults(own=run)


def run(args: argparse.Namespace) -> int:
    folder = Path(args.dataset).expanduser()
    open_data_set(folder)  # before a lock file is made in somebody else's folder
    with locked(folder), bars() as report:
        data = open_data_set(folder)
        rows = scan(
            data,
            _asked(args.set, data.heldout, f"{folder} has no held-out set"),
            _asked(args.source, data.sources, f"{folder} has no source"),
            method=args.method,
            limits=_limits(args),
            common=args.common,
            processes=args.processes,
            report=report,
        )
        drop = to_drop(rows) if args.drop else {}
        shown = _shown(rows, dropped=args.drop)
        remove(data, drop, _by_fingerprint(data, shown), report)
    if args.json:
        print(json.dumps({"dataset": str(folder), "overlap": shown}, indent=1))
    else:
        _print(shown)
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    given = {"windows": args.limit_windows, "share": args.limit_share}
    for name, value in given.items():
        if value is not None and value < 0:
            raise UserError(f"--limit-{name} {value} is negative; 0 calls any shared window a leak")
    return replace(Limits.of(args.method), **{k: v for k, v in given.items() if v is not None})


def _asked(names: list[str], known: Mapping[str, Any], message: str) -> list[str]:
    for name in names:
        if name not in known:
            raise UserError(f"{message} {name!r}; it has {', '.join(known) or 'none'}")
    if not known:
        raise UserError(f"{message}; add one with python -m jaxmoe.data holdout")
    return list(dict.fromkeys(names)) or sorted(known)


def _shown(rows: _Rows, *, dropped: bool) -> _Rows:
    """As the manifest keeps it: counts, without the list of documents."""

    def one(row: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in row.items() if k != "drop"}
        leaking = kept["leaking"]
        return {**kept, "leaking": 0 if dropped else leaking, "dropped": leaking if dropped else 0}

    return {name: {s: one(row) for s, row in found.items()} for name, found in rows.items()}


def _by_fingerprint(data: DataSet, rows: _Rows) -> _Rows:
    return {data.manifest["heldout"][n]["text_fingerprint"]: found for n, found in rows.items()}


def _print(rows: _Rows) -> None:
    console = Console()
    title = "held-out text in the training sources"
    table = Table("set", "source", title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("documents", "sharing", "leaking", "dropped", "covered", "unseen"):
        table.add_column(column, justify="right")
    for name, found in rows.items():
        for source, row in found.items():
            covered = row["heldout_covered"] / max(1, row["heldout_windows"])
            counts = [f"{row[k]:,}" for k in ("documents", "touched", "leaking", "dropped")]
            table.add_row(name, source, *counts, f"{covered:.4%}", f"{row['heldout_unchecked']:,}")
    table.caption = "covered: of the held-out windows; unseen: held-out documents without any"
    console.print(table)
    for name, found in rows.items():
        for source, row in found.items():
            for worst in row["worst"][:3]:
                shown = " ".join(worst["passage"].split())
                console.print(
                    f"{name} in {source}: {escape(worst['name'])} shares {worst['hits']:,} of"
                    f" {worst['windows']:,} windows with {escape(worst['of'])}: {escape(shown)}",
                    soft_wrap=True,
                    highlight=False,
                )
