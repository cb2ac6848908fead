"""`python -m jaxmoe.plan`: will it fit, how long will it take, what will it cost."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.plan import aot, page
from jaxmoe.plan.answer import check_devices, plan, versions
from jaxmoe.plan.hardware import NAMES, Hardware, find
from jaxmoe.plan.search import Found, search
from jaxmoe.plan.stages import pinned

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.py"
TARGETS = "tpu:v5p:16x16x16, tpu:v6e:16x16, h100:HOSTSx8 (extras aot-tpu, aot-cuda)"
WIDE = 110  # columns where there is no terminal

EXAMPLES = """examples:
  python -m jaxmoe.plan                                        the quickstart on this machine
  python -m jaxmoe.plan --config configs/olmoe.py --hardware h100 --devices 64
  python -m jaxmoe.plan --config configs/olmoe.py --hardware h100 --devices 64 --search
  python -m jaxmoe.plan --config configs/gpt4.py:gpt4_a100 --hardware a100 --devices 24960 \\
      --tokens 13e12 --mfu 0.35 --price 1
  python -m jaxmoe.plan --config configs/mixtral.py --hardware v5p --devices 256 \\
      --set mesh.expert=8 --set model.remat=none --json
  python -m jaxmoe.plan --config configs/gpt4.py --compile tpu:v5p:16x16x16 \\
      --set mesh.replica=1 --set mesh.data=32 --set train.batch_size=512
                                                 by the real compiler, without the chips

exit codes: 0 it fits, 1 it does not (or no mesh of --search does), 2 a mistake in what was asked"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        # Nothing runs on a device but the measurement of this machine.
        jax.config.update("jax_platforms", "cpu")
        config = config_lib.apply_sets(config_lib.load(str(args.config)), args.set)
        check_devices(args.devices)
        if args.compile:
            return _compile(args, config)
        chip = find(args.hardware)
        return (_search if args.search else _plan)(args, config, chip)
    except UserError as error:
        print(f"jaxmoe.plan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxmoe.plan: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.plan",
        description="Will a run fit, how long will it take, what will it cost (docs/plan.md).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default=QUICKSTART, metavar="FILE[:FUNCTION]", help="default: the quickstart")
    add("--hardware", default="cpu", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    add("--devices", type=int, default=1, metavar="N", help="chips in all (default 1)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one config value")
    add("--tokens", type=_tokens, metavar="T", help="of the run; default: those of train.steps")
    add("--search", action="store_true", help="rank all meshes that divide and fit")
    add("--efficiency", type=_share, metavar="E", help="of the peak in a step's compute, 0 to 1")
    add("--mfu", type=_share, metavar="M", help="also say days and money at this MFU")
    add("--price", type=float, metavar="DOLLARS", help="of a chip-hour; default: the table's")
    add("--compile", metavar="TARGET", help=f"the step by the real compiler: {TARGETS}")
    add("--json", action="store_true", help="print JSON for a script")
    return parser


def _plan(args: argparse.Namespace, config: Config, chip: Hardware) -> int:
    answer = plan(
        config,
        args.devices,
        chip,
        efficiency=args.efficiency,
        tokens=args.tokens,
        mfu=args.mfu,
        price=args.price,
    )
    if args.json:
        print(json.dumps({**answer.as_dict(), **versions()}))
    else:
        page.show(answer, _console())
    return 0 if answer.fits else 1


def _compile(args: argparse.Namespace, config: Config) -> int:
    """Of the train step in each of its shapes, for chips that are not here (jaxmoe/plan/aot.py)."""
    check(config)
    shapes = curriculum(config).shapes
    reports = []
    for shape in shapes:
        with Console(stderr=True).status(f"compiling for {args.compile}: minutes for a large mesh"):
            reports.append(aot.compile_report(pinned(config, shape), args.compile))
        if not args.json:
            if len(shapes) > 1:
                _console().rule(f"{shape.batch:,} x {shape.length:,}", align="left")
            _console().print(aot.render(reports[-1]))
    if args.json:
        found = [asdict(report) for report in reports]
        if len(shapes) > 1:
            each = [{"shape": asdict(s), **f} for s, f in zip(shapes, found, strict=True)]
            print(json.dumps({"stages": each, **versions()}))
        else:
            print(json.dumps({**found[0], **versions()}))
    return 0 if all(report.fits for report in reports) else 1


def _search(args: argparse.Namespace, config: Config, chip: Hardware) -> int:
    efficiency = chip.efficiency if args.efficiency is None else args.efficiency
    found = _searched(config, args.devices, chip, efficiency)
    if args.json:
        counts = {k: v for k, v in asdict(found).items() if k != "best"}
        print(json.dumps({**counts, "best": [a.as_dict() for a in found.best], **versions()}))
    else:
        page.show_found(found, _console())
    return 0 if found.best else 1


def _searched(config: Config, n_devices: int, chip: Hardware, efficiency: float) -> Found:
    """With a bar on a terminal's standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("meshes", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return search(config, n_devices, chip, efficiency, progress=progress)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _tokens(text: str) -> int:
    try:
        tokens = int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text}: write a number, such as 13e12") from None
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least one")
    return tokens


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share above 0, at most 1")
    return share


if __name__ == "__main__":
    sys.exit(main())
