"""`python -m jaxmoe.forecast register | passes`: options, and what is printed."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.pass_register import (
    PASS_RATES,
    read_counts,
    register_outcome,
    register_passes,
    score_passes,
)

__all__ = ["add_passes", "add_register", "show_line", "show_passes"]


def add_register(parser: argparse.ArgumentParser) -> None:
    """Options of `register`."""
    records = "records.jsonl of a ladder: finished runs of the target's recipe and data"
    parser.add_argument(
        "--ladder", metavar="RECORDS", type=Path, nargs="+", required=True, help=records
    )
    earlier = "records of a ladder of the same sizes with larger runs, on other text or recipe"
    parser.add_argument("--earlier", metavar="RECORDS", type=Path, nargs="+", help=earlier)
    parser.add_argument(
        "--target", metavar="FILE[:FUNCTION]", required=True, help="config of the run"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one config value"
    )
    where = "its run directory, where train goes on from (default: runs/NAME)"
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help=where)
    add_correct(parser)


def add_passes(parser: argparse.ArgumentParser) -> None:
    """Options of `passes`."""
    counts = "JSON lines of compute, bucket, task, passes, tries"
    parser.add_argument("counts", metavar="COUNTS", type=Path, help=counts)
    parser.add_argument("--flops", type=float, metavar="C", help="training compute of the target")
    where = f"where {PASS_RATES} is or will be"
    parser.add_argument("--run-dir", metavar="DIR", type=Path, required=True, help=where)
    outcome = "COUNTS are the target's own: register them, and score what was forecast"
    parser.add_argument("--outcome", action="store_true", help=outcome)
    add_correct(parser)


def add_correct(parser: argparse.ArgumentParser) -> None:
    why = "a new line for one that is there already; both stay"
    parser.add_argument("--correct", metavar="REASON", help=why)


def show_line(line: Mapping[str, Any], file: Path, *, as_json: bool, console: Console) -> int:
    """The forecast that was registered."""
    if as_json:
        print(json.dumps(line, allow_nan=False))
        return 0
    to = line["target"]
    title = (
        f"held-out loss at step {line['target_step']}: {to['params_active']:.3g} active parameters,"
        f" {to['tokens']:.3g} tokens, {line['extrapolation']:.3g} times the largest run's compute"
    )
    table = Table("step", "5 %", "25 %", "median", "75 %", "95 %", title=title)
    rows = line["path"]
    for at in sorted({*np.round(np.linspace(0, len(rows) - 1, 10)).astype(int)}):
        values = (rows[at][name] for name in register.LEVELS)
        table.add_row(str(rows[at]["step"]), *(f"{value:.4f}" for value in values))
    console.print(table)
    weights = ", ".join(f"{name} {w:.0%}" for name, w in line["laws"].items())
    runs = f"{len(line['siblings'])} runs"
    if "earlier" in line:
        runs += f" beside {len(line['earlier'])} earlier ones"
    console.print(f"{line['law']}: {weights}; from {runs} of {line['set']}")
    if line["misfits"]:
        odd = ", ".join(sha256[:12] for sha256 in line["misfits"])
        console.print(f"runs that do not fall onto the others (mis-tuned?): {odd}")
    head = register.head(file)
    console.print(f"registered as line {line['index'] + 1} of {file}")
    console.print(f"its hash, to be kept elsewhere: {head['head']}", soft_wrap=True)
    return 0


def show_passes(args: argparse.Namespace, console: Console) -> int:
    """Registers pass rates, or their outcome with its scores."""
    counts = read_counts(args.counts)
    file = args.run_dir / PASS_RATES
    if not args.outcome:
        if args.flops is None:
            raise UserError("give the target: --flops C; or --outcome with its own counts")
        line = register_passes(counts, args.flops, args.run_dir, correct=args.correct)
        if args.json:
            print(json.dumps(line, allow_nan=False))
            return 0
        title = f"-E[log pass rate] at {line['flops']:.3g} FLOPs (line {line['index'] + 1})"
        table = Table("bucket", "5 %", "25 %", "median", "75 %", "95 %", "pass rate", title=title)
        for name, loss in line["buckets"].items():
            values = (f"{loss[level]:.4f}" for level in register.LEVELS)
            table.add_row(name, *values, f"{np.exp(-loss['median']):.1%}")
        console.print(table)
        return 0
    if args.flops is not None or args.correct is not None:
        raise UserError("--outcome takes the target's compute from COUNTS, and corrects nothing")
    register_outcome(counts, args.run_dir)
    scores = score_passes(register.read(file))
    if args.json:
        print(json.dumps({"scores": [dataclasses.asdict(one) for one in scores]}))
        return 0
    table = Table("line", "bucket", "median", "5 to 95 %", "realised", "error", "in 90 %")
    for one in scores:
        band = f"{one.q05:.4f} to {one.q95:.4f}"
        numbers = (f"{one.median:.4f}", band, f"{one.realised:.4f}", f"{one.error:+.1%}")
        table.add_row(str(one.index + 1), one.bucket, *numbers, "yes" if one.inside90 else "no")
    console.print(table)
    return 0
