"""`python -m jaxmoe.forecast fit RECORDS...`: the final loss of a run from finished ones."""

import argparse
import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.forecast.baseline import ComputeFloor, compute_floor
from jaxmoe.forecast.dense_laws import DEFAULT
from jaxmoe.forecast.moe_law import MoeStack, MoeStackFit
from jaxmoe.forecast.points import Points, read_points
from jaxmoe.forecast.stack import Stack, StackFit, misfits

__all__ = ["add_target", "fit_points"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
NAMES = ("q05", "q25", "median", "q75", "q95")
SMALLEST = 0.5  # target's compute over the largest run's
MANY = 200  # runs from which on the leave-one-out check of each would take long


def add_target(parser: argparse.ArgumentParser) -> None:
    """The options that say which run is forecast."""
    parser.add_argument("--flops", type=float, metavar="C", help="training compute of the target")
    parser.add_argument("--params", type=float, metavar="N", help="its active parameters")
    parser.add_argument("--tokens", type=float, metavar="D", help="its training tokens")
    parser.add_argument("--unique-tokens", type=float, metavar="U", help="of them, seen first")
    parser.add_argument("--params-total", type=float, metavar="N", help="with all experts")
    parser.add_argument("--experts", type=float, metavar="E", help="its experts (default 1)")
    parser.add_argument("--top-k", type=float, metavar="K", help="experts a token (default 1)")
    parser.add_argument("--router", metavar="NAME", default="", help="as in the records")


def fit_points(args: argparse.Namespace, console: Console) -> int:
    """Prints the forecast as a table or JSON."""
    points = read_points(args.records)
    target = _target(args, points)
    ratio = float(target.flops[0] / points.flops.max())
    if ratio < SMALLEST:
        raise UserError(
            f"the target has {ratio:.2g} of the largest run's compute, and the laws trust runs "
            "near the largest; leave the larger runs out of the records"
        )
    dense = float(np.max(points.params_total / points.params_active)) <= 1.001
    dense = dense and bool(np.all(points.experts <= 1))
    fit: StackFit | MoeStackFit = Stack().fit(points) if dense else MoeStack().fit(points)
    quantiles = fit.mixture(target).quantile(LEVELS)[:, 0]
    floor = None
    flagged: list[int] = []
    if dense:
        floor = compute_floor(points, float(target.flops[0]), pinned_at=DEFAULT.irreducible)
        flagged = misfits(points) if len(points) <= MANY else []
    answer: dict[str, Any] = {
        "target": {
            "params_active": float(target.params_active[0]),
            "tokens": float(target.tokens[0]),
            "flops": float(target.flops[0]),
        },
        "loss": dict(zip(NAMES, map(float, quantiles), strict=True)),
        "extrapolation": ratio,
        "runs": len(points),
        "dropped": points.dropped,
        "laws": fit.weights,
        "backtests": [dataclasses.asdict(b) for b in getattr(fit, "backtests", ())],
        "misfits": [i + 1 for i in flagged],
        "floor": None if floor is None else dataclasses.asdict(floor),
    }
    if args.json:
        print(json.dumps(answer, allow_nan=False))
    else:
        _show(console, answer, floor)
    return 0


def _target(args: argparse.Namespace, points: Points) -> Points:
    n, d = _sizes(args, points)
    extra = {
        "flops": args.flops,
        "params_total": args.params_total,
        "unique_tokens": args.unique_tokens,
        "experts": args.experts,
        "top_k": args.top_k,
    }
    given = {name: [value] for name, value in extra.items() if value is not None}
    return Points.of([n], [d], router=[args.router], **given)


def _sizes(args: argparse.Namespace, points: Points) -> tuple[float, float]:
    """Active parameters and tokens. Compute alone means: on the line of N over C of the records."""
    n, d, c = args.params, args.tokens, args.flops
    for name, value in (("--params", n), ("--tokens", d), ("--flops", c)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: it must be a finite number above 0")
    if n is not None and d is not None:
        return n, d
    if c is None:
        raise UserError("give the target: --flops, or --params and --tokens, or all three")
    if d is not None:
        return c / (6.0 * d), d
    if n is None:
        if points.budgets.size < 2:
            raise UserError("one compute budget tells no line of sizes; give --params and --tokens")
        line = np.polyfit(np.log(points.flops), np.log(points.params_active), 1)
        n = float(np.exp(np.polyval(line, np.log(c))))
    return n, c / (6.0 * n)


def _show(console: Console, answer: dict[str, Any], floor: ComputeFloor | None) -> None:
    to = answer["target"]
    title = (
        f"final loss of {to['params_active']:.3g} active parameters, {to['tokens']:.3g} tokens, "
        f"{to['flops']:.3g} FLOPs: {answer['extrapolation']:.3g} times the largest run"
    )
    table = Table("5 %", "25 %", "median", "75 %", "95 %", title=title)
    table.add_row(*(f"{v:.4f}" for v in answer["loss"].values()))
    console.print(table)
    weights = ", ".join(f"{name} {w:.0%}" for name, w in answer["laws"].items())
    console.print(f"laws, weighed by backtest: {weights}")
    for test in answer["backtests"]:
        errors = ", ".join(f"{e:+.2%}" for e in test["error"])
        console.print(f"backtest at {test['ratio']:.3g} times the compute: {errors}")
    if floor is not None and floor.forecasts is not None:
        table = Table("L(C) = a C^-b + c", "c", "forecast", title="how the floor is treated")
        free, profiled, pinned = (f"{v:.4f}" for v in floor.forecasts)
        mean, low, high = floor.profiled
        table.add_row("free", f"{floor.free[0]:.3f}", free)
        table.add_row("profiled", f"{mean:.3f} ({low:.3f} to {high:.3f})", profiled)
        table.add_row("pinned", f"{floor.pinned_at:.3f}", pinned)
        console.print(table)
    if answer["misfits"]:
        rows = ", ".join(map(str, answer["misfits"]))
        console.print(f"runs that do not fall onto the others (mis-tuned?): rows {rows}")
    if answer["dropped"]:
        console.print(f"{answer['dropped']} incomplete rows were left out")
