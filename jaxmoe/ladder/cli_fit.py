"""`python -m jaxmoe.ladder fit`."""

import argparse
import json

from rich.console import Console
from rich.table import Table

from jaxmoe.ladder.fit import Analysis, analyse, answer, flagged
from jaxmoe.ladder.picture import draw
from jaxmoe.ladder.reading import open_ladder
from jaxmoe.ladder.targets import read_targets

__all__ = ["command"]

HEADS = ("rung", "seed", "active", "total", "tokens", "FLOPs", "loss", "law", "off", "collapse")
WIDE = 120  # columns where there is no terminal


def command(args: argparse.Namespace) -> int:
    ladder = open_ladder(*args.ladders)
    found = analyse(ladder, args.budget, read_targets(args.run, ladder))
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_text(draw(found))
    if args.json:
        print(json.dumps(answer(found), allow_nan=False))
        return 0
    show(found, console())
    if args.picture:
        print(f"picture: {args.picture}")
    return 0


def console() -> Console:
    """As wide as the terminal, or WIDE."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDE)


def show(found: Analysis, out: Console) -> None:
    """The tables."""
    table = Table(title=f"{len(found.ladder.rows)} runs; loss in nats per token")
    for head in HEADS:
        table.add_column(head, justify="right")
    for row, fitted, one in zip(found.ladder.rows, found.fitted, found.collapse, strict=True):
        sizes = (f"{row[k]:.3g}" for k in ("params_active", "params_total", "tokens", "flops"))
        fall = "" if one.sigmas is None else f"{one.sigmas:.1f}"
        losses = (f"{row['loss']:.4f}", f"{fitted:.4f}", f"{row['loss'] / fitted - 1:+.2%}")
        table.add_row(str(row["rung"]), str(row["seed"]), *sizes, *losses, fall)
    out.print(table)
    weights = ", ".join(f"{name} {w:.0%}" for name, w in found.fit.weights.items())
    out.print(f"laws, weighed by backtest: {weights}")
    if found.holdouts:
        table = Table(title="the largest rung, forecast from the smaller ones")
        for head in ("runs seen", "extrapolated", "median", "90 % interval", "came out", "error"):
            table.add_column(head, justify="right")
        for h in found.holdouts:
            band = f"{h.loss[0]:.4f} to {h.loss[2]:.4f}"
            inside = "" if h.inside else " (outside)"
            table.add_row(
                str(h.seen),
                f"{h.ratio:.3g}x",
                f"{h.loss[1]:.4f}",
                band,
                f"{h.realised:.4f}",
                f"{h.error:+.2%}{inside}",
            )
        out.print(table)
    for row, why in flagged(found):
        out.print(f"rung {row['rung']}, seed {row['seed']}, {row['tokens']:.3g} tokens: {why}")
    _show_targets(found, out)
    _show_budget(found, out)


def _show_targets(found: Analysis, out: Console) -> None:
    if not found.targets:
        return
    table = Table(title="runs as they were forecast before their start")
    for head in ("run", "law", "extrapolated", "median", "90 % interval", "came out", "error"):
        table.add_column(head, justify="right")
    for t in found.targets:
        band = f"{t.loss.q05:.4f} to {t.loss.q95:.4f} ({t.half_width:.1%})"
        came = "" if t.realised is None else f"{t.realised:.4f}"
        error = "" if t.error is None else f"{t.error:+.2%}{'' if t.inside else ' (outside)'}"
        table.add_row(t.name, t.law, f"{t.ratio:.0f}x", f"{t.loss.median:.4f}", band, came, error)
    out.print(table)
    for t in found.targets:
        if not t.from_here:
            out.print(f"{t.name}: its forecast rests on other records than these")
        if t.problems:
            out.print(f"{t.name}: forecast verify finds {t.problems} problems in its register")


def _show_budget(found: Analysis, out: Console) -> None:
    best = found.optimum
    if best is not None and found.at_budget is not None:
        table = Table("", "5 %", "median", "95 %", title=f"best run of {best.flops:.3g} FLOPs")
        table.add_row("active parameters", *(f"{v:.3g}" for v in best.params_active))
        table.add_row("tokens", *(f"{v:.3g}" for v in best.tokens))
        table.add_row("loss of such a run", *(f"{v:.4f}" for v in found.at_budget))
        out.print(table)
        if best.from_prior:
            out.print(
                "all runs lie on one line of tokens over parameters: the split is the prior's;"
                " add rungs or --horizons off that line"
            )
    if found.mixed:
        table = Table("experts", "top-k", "active", "total", "tokens", "loss", "90 % interval")
        for m in found.mixed:
            sizes = (f"{v:.3g}" for v in (m.params_active, m.params_total, m.tokens))
            band = f"{m.loss[0]:.4f} to {m.loss[2]:.4f}"
            table.add_row(f"{m.experts:g}", f"{m.top_k:g}", *sizes, f"{m.loss[1]:.4f}", band)
        out.print(table)
