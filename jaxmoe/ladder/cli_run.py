"""`python -m jaxmoe.ladder run`."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxmoe.errors import UserError
from jaxmoe.ladder.family import Family, load_family, numbers
from jaxmoe.ladder.points import RUNS, Point, plan_points
from jaxmoe.ladder.records import RECORDS
from jaxmoe.ladder.runner import ROOT, Outcome, View, missing, submit, train_points

__all__ = ["SLURM", "add_runs", "command", "train_family"]

SLURM = "sbatch --job-name={name} launch/slurm.sh --run-dir {run} --command {command}"


def add_runs(add: Callable[..., Any]) -> None:
    """The options that say which runs a family has."""
    add("--rungs", metavar="0..7", help="0..7 or 0,2,5")
    add("--seeds", default="1", metavar="N", help="a number of seeds, or which: 1..2 (default 1)")
    add("--horizons", metavar="0.25,0.5", help="shares of a WSD rung also annealed, from one run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change every rung")


def command(args: argparse.Namespace) -> int:
    family = load_family(args.family, args.set)
    points = planned(args, family)
    if args.submit or args.slurm:
        return _submit(args, family, points)
    outcome = train_family(points, args.out, family, quiet=args.json)
    if args.json:
        print(
            json.dumps(
                {
                    "records": str(args.out / RECORDS),
                    "trained": outcome.trained,
                    "recorded": outcome.recorded,
                    "failed": outcome.failed,
                }
            )
        )
    else:
        print(
            f"{args.out}: {len(outcome.trained)} trained, {len(outcome.recorded)} were there,"
            f" {len(outcome.failed)} failed"
        )
    return 1 if outcome.failed else 0


def planned(args: argparse.Namespace, family: Family) -> list[Point]:
    """The points that the options ask for."""
    if not args.rungs:
        raise UserError("--rungs: say which, for example --rungs 0..3")
    rungs = numbers(args.rungs, "--rungs")
    seeds = numbers(args.seeds, "--seeds", count=True)
    return plan_points(family, rungs, seeds, _shares(args.horizons))


def train_family(points: Sequence[Point], folder: Path, family: Family, *, quiet: bool) -> Outcome:
    """Trains what is missing, with a bar where there is a terminal."""
    console = Console(stderr=quiet)
    folder.mkdir(parents=True, exist_ok=True)
    view: View
    if console.is_terminal:
        with Bar(points, console) as view:
            return train_points(points, folder, family, view)
    return train_points(points, folder, family, Lines(quiet=quiet))


def _shares(text: str | None) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if any(not 0 < share < 1 for share in found):
        raise UserError(f"--horizons {text}: shares of a rung's steps, above 0 and below 1")
    return found


def _submit(args: argparse.Namespace, family: Family, points: Sequence[Point]) -> int:
    """One job for each rung and seed, which is this very command for it alone."""
    if args.submit and args.slurm:
        raise UserError("--slurm is a --submit of its own; give one of them")
    jobs: dict[str, list[str]] = {}
    runs: dict[str, Path] = {}
    file, colon, function = args.family.partition(":")
    for point in missing(points, args.out, family):
        words = [sys.executable, "-m", "jaxmoe.ladder", "run", "--out", str(args.out.resolve())]
        words += ["--family", f"{Path(file).resolve()}{colon}{function}"]
        words += ["--rungs", str(point.rung), "--seeds", f"{point.seed}..{point.seed}"]
        words += ["--horizons", args.horizons] if args.horizons else []
        words += [word for one in args.set for word in ("--set", one)]
        name = f"rung-{point.rung:02}-seed-{point.seed}"
        # Of the trunk: its branches have points of their own, in the same job.
        jobs[name], runs[name] = words, args.out.resolve() / RUNS / name
    args.out.mkdir(parents=True, exist_ok=True)
    answers = submit(args.submit or _slurm(), jobs, runs)
    if args.json:
        print(json.dumps({"jobs": dict(zip(jobs, answers, strict=True))}))
    else:
        for name, said in zip(jobs, answers, strict=True):
            print(f"{name}: {said}")
    return 0


def _slurm() -> str:
    """SLURM, wherever the command was started."""
    script = ROOT / "launch" / "slurm.sh"
    if not script.exists():
        raise UserError(f"--slurm: no {script}: it is for a checkout; say --submit TEMPLATE")
    return SLURM.replace("launch/slurm.sh", shlex.quote(str(script)))


class Lines:
    """A line at a time, for logs and pipes."""

    def __init__(self, *, quiet: bool) -> None:
        self._out = sys.stderr if quiet else sys.stdout

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def show(self, point: Point, step: int, loss: float | None) -> None:
        pass

    def done(self, point: Point) -> None:
        pass


class Bar:
    """One bar over all points, in FLOPs: the last rung takes most of the time."""

    def __init__(self, points: Sequence[Point], console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("ladder", total=sum(p.flops for p in points))
        self._done = 0.0

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def show(self, point: Point, step: int, loss: float | None) -> None:
        steps = point.config.train.steps
        said = "" if loss is None else f" loss {loss:.3f}"
        part = max(0, step - point.branch) / (steps - point.branch)
        self._bar.update(
            self._task,
            completed=self._done + part * point.flops,
            description=f"{point.name} step {step}/{steps}{said}",
        )

    def done(self, point: Point) -> None:
        self._done += point.flops
        self._bar.update(self._task, completed=self._done)
