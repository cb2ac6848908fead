"""`python -m jaxmoe.forecast`: registers forecasts, verifies and scores them, fits records."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.cli_benchmark import show_benchmark
from jaxmoe.forecast.cli_points import add_target, fit_points
from jaxmoe.forecast.cli_register import add_passes, add_register, show_line, show_passes
from jaxmoe.forecast.cli_score import show_scores
from jaxmoe.forecast.curve import Run
from jaxmoe.forecast.hook_api import Forecast, forecast_final
from jaxmoe.forecast.ladder import read_ladder
from jaxmoe.forecast.ladder_register import register_target
from jaxmoe.forecast.pass_register import PASS_RATES
from jaxmoe.forecast.register import FORECASTS
from jaxmoe.forecast.register_beside import read_schedule
from jaxmoe.outside import group, json_object

EXAMPLES = """examples:
  python -m jaxmoe.forecast verify runs/tiny
  python -m jaxmoe.forecast score runs/tiny runs/small --picture scores.svg
  python -m jaxmoe.forecast score runs/tiny --json
  python -m jaxmoe.forecast score --benchmark --data loss_curves
  python -m jaxmoe.forecast fit runs/tiny --at 300
  python -m jaxmoe.forecast fit ladder.csv --params 7e9 --tokens 2e11 --json
  python -m jaxmoe.forecast register --ladder ladder/records.jsonl --target configs/big.py
  python -m jaxmoe.forecast register --ladder moe.jsonl --earlier old.jsonl --target configs/big.py
  python -m jaxmoe.forecast passes counts.jsonl --flops 1e21 --run-dir runs/big

exit codes: 0 success, 1 verify found problems, 2 a mistake in what was asked"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as error:
        print(f"jaxmoe.forecast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.forecast", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="{verify,score,fit,register,passes}")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw
        )
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print JSON for a script")
        return sub

    verify = add("verify", _verify, "check the register's hash chain, and the evals it rests on")
    verify.add_argument("run", metavar="RUN", type=Path, help="run directory")
    scores = add("score", _score, "score every forecast against the outcome")
    scores.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="run directories")
    scores.add_argument("--picture", metavar="FILE", type=Path, help="draw to .svg, .png or .html")
    scores.add_argument("--benchmark", action="store_true", help="score all laws on public data")
    scores.add_argument("--data", metavar="DIR", type=Path, help="its points.csv, curves.csv.gz")
    fit = add("fit", _fit, "forecast a final loss: of a run from its evals, or from finished runs")
    what = "a run directory, or CSV / JSON-lines files of finished runs"
    fit.add_argument("records", metavar="RECORDS", type=Path, nargs="+", help=what)
    add_target(fit)
    fit.add_argument("--at", type=int, metavar="STEP", help="use evals up to this step only")
    fit.add_argument(
        "--eval-set", metavar="NAME", help="held-out set (default: that of the first eval)"
    )
    fit.add_argument("--seed", type=int, default=0, help="of the fit (default 0)")
    add_register(add("register", _register, "forecast a run from a ladder, before it starts"))
    add_passes(add("passes", _passes, "forecast pass rates of a larger model, or score them"))
    return parser


def _register(args: argparse.Namespace) -> int:
    """jax is loaded here alone: it counts the target's parameters and FLOPs, and its rates."""
    ladder = read_ladder(args.ladder)
    earlier = read_ladder(args.earlier) if args.earlier else None
    from jaxmoe.config import apply_sets, load
    from jaxmoe.config_check import check
    from jaxmoe.data.opened import open_corpus
    from jaxmoe.run import record
    from jaxmoe.run.target import target_of

    config = apply_sets(load(args.target), args.set)
    check(config)
    run_dir = record.run_dir(args.run_dir, config)
    record.check_directory(run_dir, config, "auto")
    shown: set[str] = set()

    def report(phase: str, done: float) -> None:
        if phase not in shown | {"list"}:
            shown.add(phase)
            print(f"data: {phase} ...", file=sys.stderr, flush=True)

    target = target_of(config, open_corpus(config, report))
    line = register_target(ladder, target, run_dir, earlier=earlier, correct=args.correct)
    return show_line(line, run_dir / FORECASTS, as_json=args.json, console=_console())


def _passes(args: argparse.Namespace) -> int:
    return show_passes(args, _console())


def _verify(args: argparse.Namespace) -> int:
    folder = _folder(args.run)
    there = (folder / FORECASTS, folder / PASS_RATES)
    files = [f for f in there if f.exists() or register.anchor_path(f).exists()]
    problems = [(f, p) for f in files or there[:1] for p in register.verify(f)]
    with_evals = (folder / "evals.jsonl").exists()
    if args.json:
        found = [{"file": f.name, **dataclasses.asdict(p)} for f, p in problems]
        print(json.dumps({"ok": not problems, "evals_checked": with_evals, "problems": found}))
    elif problems:
        told = [str(p) if f == there[0] else f"{f.name}: {p}" for f, p in problems]
        print(f"{args.run}: {len(problems)} problems", *told, sep="\n  ")
    else:
        lines = sum(len(register.read(f)) for f in files)
        against = "and its evals agree" if with_evals else "(no evals.jsonl to check it against)"
        print(f"{args.run}: {lines} lines, the chain is whole {against}")
    return 1 if problems else 0


def _score(args: argparse.Namespace) -> int:
    if args.benchmark:
        if args.data is None or args.runs or args.picture is not None:
            raise UserError("--benchmark takes --data DIR, and no runs and no --picture")
        return show_benchmark(args.data, as_json=args.json, console=_console())
    if not args.runs or args.data is not None:
        raise UserError("give run directories, or --benchmark --data DIR")
    return show_scores(args.runs, as_json=args.json, picture=args.picture, console=_console())


def _fit(args: argparse.Namespace) -> int:
    if any(path.is_file() for path in args.records):
        return fit_points(args, _console())
    if len(args.records) > 1:
        raise UserError(f"{args.records[1]}: fit takes one run directory, or files of records")
    run = load_run(args.records[0], eval_set=args.eval_set)
    forecast = forecast_final(run if args.at is None else run.until(args.at), seed=args.seed)
    if args.json:
        print(forecast.json())
        return 0
    title = f"{run.name}: held-out loss at step {forecast.target_step}, nats per token"
    table = Table("step", "5 %", "25 %", "median", "75 %", "95 %", title=title)
    for point in forecast.path:
        row = (point.q05, point.q25, point.median, point.q75, point.q95)
        table.add_row(str(point.step), *(f"{value:.4f}" for value in row))
    console = _console()
    console.print(table)
    console.print(_sentence(forecast))
    return 0


def _console() -> Console:
    # A pipe has no width, and rich would fold the tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140)


def _sentence(forecast: Forecast) -> str:
    q, dropped = forecast.loss, f", {forecast.dropped} not finite" if forecast.dropped else ""
    return (
        f"final loss {q.median:.4f}, 90 % interval {q.q05:.4f} to {q.q95:.4f}, by {forecast.law} "
        f"from {forecast.observations} evals up to step {forecast.cutoff_step}{dropped}"
    )


def load_run(folder: Path, *, eval_set: str | None = None) -> Run:
    """The run that config.json, schedule.json and evals.jsonl of a run directory describe.

    Raises:
        UserError: a file is missing or malformed, or has no eval of the set.
    """
    folder = _folder(folder)
    config = _object(folder / "config.json")
    schedule = read_schedule(folder / "schedule.json")
    rows = register.read_evals(folder / "evals.jsonl")
    names = list(dict.fromkeys(row["set"] for row in rows))
    if not names:
        raise UserError(f"{folder / 'evals.jsonl'}: no evals yet; wait for the first")
    name = names[0] if eval_set is None else eval_set
    if name not in names:
        raise UserError(f"--eval-set {name}: evals.jsonl has {', '.join(names)}")
    chosen = [row for row in rows if row["set"] == name]
    print_of_set = chosen[-1]["set_fingerprint"]
    end = schedule.steps
    steps, loss = register.observations(chosen, set_fingerprint=print_of_set, until=end)
    title = config.get("name") or group(config, "config").get("name") or folder.name
    return Run(
        schedule=schedule, steps=np.array(steps, np.int64), loss=np.array(loss), name=str(title)
    )


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    return path


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the trainer writes it when a run starts")
    return json_object(path, "restore the file")


if __name__ == "__main__":
    sys.exit(main())
