"""`python -m jaxmoe.ladder gate`."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.forecast.ladder import Ladder
from jaxmoe.ladder.advice import Option, options
from jaxmoe.ladder.cli_fit import console
from jaxmoe.ladder.cli_run import planned, train_family
from jaxmoe.ladder.family import Family, load_family
from jaxmoe.ladder.gate import Gate, gate, pair_up
from jaxmoe.ladder.reading import open_ladder

__all__ = ["command"]

CODES = {"keep": 0, "drop": 1, "undecided": 3}


def command(args: argparse.Namespace) -> int:
    if (args.candidate is None) == (not args.change):
        raise UserError("give the change: --candidate G, or --change KEY=VALUE of the baseline")
    first = _ladder(args, args.baseline, (), "baseline")
    second = _ladder(args, args.candidate or args.baseline, args.change, "candidate")
    pairs = pair_up(first.rows, second.rows)
    found = gate(pairs, args.at, worth=args.worth, level=args.level)
    ratio = float(np.exp(np.mean(np.log(pairs.flops_candidate / pairs.flops))))
    more = options(found, ratio) if found.verdict == "undecided" else []
    changed = _changed(first, second)
    if args.json:
        print(json.dumps(_answer(found, more, changed), allow_nan=False))
    else:
        _show(found, more, changed, console())
    return CODES[found.verdict]


def _ladder(args: argparse.Namespace, spec: str, change: tuple[str, ...], name: str) -> Ladder:
    """Records that are there, or those of a family, trained where they are missing."""
    path = Path(spec)
    if path.is_dir() or path.suffix == ".jsonl":
        if change:
            raise UserError(f"--change needs a family as --baseline; {spec} is a finished ladder")
        return open_ladder(path)
    if args.out is None:
        raise UserError(f"--out: {spec} is a family; say where its runs go")
    family: Family = load_family(spec, args.set)
    family = family.changed(change) if change else family
    folder = args.out / name
    outcome = train_family(planned(args, family), folder, family, quiet=args.json)
    if outcome.failed:
        which, why = next(iter(outcome.failed.items()))
        raise UserError(f"{folder}: {which} failed ({why}); the gate needs its runs")
    return open_ladder(folder)


def _changed(first: Ladder, second: Ladder) -> list[str]:
    """`key: baseline -> candidate` of the recipes."""
    a, b = (ladder.rows[0].get("recipe", {}) for ladder in (first, second))
    keys = sorted(k for k in {*a, *b} if a.get(k) != b.get(k))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys]


def _answer(found: Gate, more: list[Option], changed: list[str]) -> dict[str, Any]:
    low, middle, high = found.measured
    rungs = zip(found.rungs, found.flops, found.pairs, low, middle, high, strict=True)
    names = ("rung", "flops", "pairs", "q05", "median", "q95")
    three = lambda v: dict(zip(("q05", "median", "q95"), map(float, v), strict=True))  # noqa: E731
    return {
        "verdict": found.verdict,
        "change": changed,
        "at": found.target,
        "worth": found.worth,
        "level": found.level,
        "probability": found.probability,
        "ratio_at_target": three(found.projection),
        "trend_per_decade": three(found.trend * np.log(10)),
        "pair_noise": found.noise,
        "rungs": [dict(zip(names, map(float, one), strict=True)) for one in rungs],
        "options": [vars(one) for one in more],
    }


def _show(found: Gate, more: list[Option], changed: list[str], out: Console) -> None:
    if changed:
        out.print(f"the change: {'; '.join(changed)}", markup=False)
    table = Table(title="effective compute ratio: above 1 the candidate is better")
    for head in ("rung", "FLOPs", "pairs", "ratio", "90 % interval"):
        table.add_column(head, justify="right")
    for rung, flops, count, (low, middle, high) in zip(
        found.rungs, found.flops, found.pairs, found.measured.T, strict=True
    ):
        band = f"{low:.3f} to {high:.3f}"
        table.add_row(str(rung), f"{flops:.3g}", str(count), f"{middle:.3f}", band)
    low, middle, high = found.projection
    table.add_row("at", f"{found.target:.3g}", "", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    out.print(table)
    low, middle, high = np.expm1(found.trend * np.log(10))
    trend = f"{middle:+.1%} per decade of compute ({low:+.1%} to {high:+.1%})"
    out.print(f"trend of the ratio: {trend}")
    out.print(f"seeds of a rung differ by {found.noise:.2%} of the loss, pair by pair")
    said = f"a ratio above {found.worth:g} at {found.target:.3g} FLOPs: {found.probability:.1%}"
    out.print(f"{found.verdict}: {said}")
    if more:
        table = Table("what more", "FLOPs", "sd of the log ratio then", "chance of a verdict")
        for one in more:
            table.add_row(one.what, f"{one.flops:.3g}", f"{one.sd:.3f}", f"{one.chance:.0%}")
        out.print(table)
