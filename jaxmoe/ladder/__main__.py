"""`python -m jaxmoe.ladder`: small runs by one recipe: train, fit, register, and gate changes."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe import exits
from jaxmoe.errors import UserError
from jaxmoe.ladder import cli_add, cli_fit, cli_gate, cli_run
from jaxmoe.ladder.runner import Asked

EXAMPLES = """examples:
  python -m jaxmoe.ladder run --family configs/ladder.py --rungs 0..5 --seeds 2 --out ladders/moe
  python -m jaxmoe.ladder run --family configs/ladder.py:dense --rungs 0..4 --out ladders/dense \\
      --horizons 0.25,0.5 --set data.path=my_texts --set "data.holdout=()"
  python -m jaxmoe.ladder run --family configs/ladder.py --rungs 0..7 --out ladders/big \\
      --submit 'sbatch --gpus-per-node=8 launch/slurm.sh --run-dir {run} --command {command}'
  python -m jaxmoe.ladder fit ladders/moe --budget 1e21 --picture ladder.svg
  python -m jaxmoe.ladder register ladders/moe --target configs/target.py --run-dir runs/target
  python -m jaxmoe.ladder add runs/target_dense --ladder ladders/dense --rung 32 --out ladders/known
  python -m jaxmoe.ladder register ladders/moe --earlier ladders/dense ladders/known \
      --target configs/ladder.py:target_moe
  python -m jaxmoe.ladder gate --baseline ladders/moe --candidate ladders/shared --at 1e23
  python -m jaxmoe.ladder gate --baseline configs/ladder.py --change model.qk_norm=none \\
      --rungs 0..4 --seeds 2 --out ladders/qk --at 1e18

exit codes: run 0, or 1 if a rung failed (the same command goes on); gate 0 keep, 1 drop, 3
undecided; 2 a mistake in what was asked; 75 asked to end by SIGUSR1, state saved: run it again;
130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    # As Ctrl-C: the process that trains is ended before this one.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.command(args)
    except UserError as error:
        print(f"jaxmoe.ladder: {error}", file=sys.stderr)
        return 2
    except Asked as asked:
        print(f"jaxmoe.ladder: {asked}; the same command goes on from here", file=sys.stderr)
        return exits.REQUEUE
    except KeyboardInterrupt:
        print("jaxmoe.ladder: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.ladder", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="{run,fit,add,register,gate}")

    def add(name: str, command: Any, text: str) -> Any:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw
        )
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print JSON for a script")
        return sub.add_argument

    one = add("run", cli_run.command, "train what is missing of a ladder, and record it")
    one("--family", required=True, metavar="FILE[:FUNCTION]", help="rung(k) -> Config")
    one("--out", required=True, type=Path, metavar="DIR", help="the ladder's folder")
    cli_run.add_runs(one)
    one(
        "--submit",
        metavar="TEMPLATE",
        help="hand a job a rung to a scheduler ({name}, {run}, {command})",
    )
    one("--slurm", action="store_true", help=f"--submit {cli_run.SLURM!r}")

    folders = "folders of ladders of one recipe, or their records.jsonl"
    one = add("fit", cli_fit.command, "laws over a ladder's records, and what is out of line")
    one("ladders", type=Path, nargs="+", metavar="DIR", help=folders)
    one("--budget", type=float, metavar="FLOPS", help="the best sizes for so much compute")
    run = "a run that was forecast from these records: what was registered, and what came"
    one("--run", type=Path, action="append", default=[], metavar="DIR", help=run)
    one("--picture", type=Path, metavar="FILE.svg", help="loss over compute, as SVG")

    one = add("add", cli_add.command, "record a finished run that was trained elsewhere")
    one("run", type=Path, metavar="RUN", help="run directory, of the ladder's recipe")
    one("--ladder", required=True, type=Path, metavar="DIR", help="whose recipe it is of")
    one("--rung", required=True, type=int, metavar="K", help="its place on the dial")
    one("--out", type=Path, metavar="DIR", help="where the record goes (default: the ladder)")

    one = add("register", _register, "register the forecast of a run before it starts")
    one("ladders", type=Path, nargs="+", metavar="DIR", help=folders)
    earlier = "ladder of the same sizes with larger runs, on other text or by another recipe"
    one("--earlier", type=Path, nargs="+", default=[], metavar="DIR", help=earlier)
    one("--target", required=True, metavar="CONFIG", help="FILE[:FUNCTION] of the run to come")
    one("--set", action="append", default=[], metavar="KEY=VALUE", help="change its config")
    one("--run-dir", type=Path, metavar="DIR", help="of the run (default runs/NAME)")
    one("--correct", metavar="REASON", help="replaces an earlier one, which stays in the register")

    one = add("gate", cli_gate.command, "does the gain of a change persist at scale?")
    either = "a ladder's folder, or a family FILE[:FUNCTION] that is trained where it is missing"
    one("--baseline", required=True, metavar="F", help=either)
    one("--candidate", metavar="G", help="likewise, with the change")
    one("--change", action="append", default=[], metavar="KEY=VALUE", help="or: of the baseline")
    one("--at", required=True, type=float, metavar="FLOPS", help="compute of the run it is for")
    one("--worth", type=float, default=1.0, metavar="RATIO", help="least ratio to keep (default 1)")
    one("--level", type=float, default=0.95, metavar="P", help="probability to decide at (0.95)")
    one("--out", type=Path, metavar="DIR", help="for families: trains below it")
    cli_run.add_runs(one)
    return parser


def _register(args: argparse.Namespace) -> int:
    """By the forecast's own command, once the recipe is known to be the ladder's."""
    from jaxmoe.config import apply_sets, load
    from jaxmoe.forecast.__main__ import main as forecast
    from jaxmoe.ladder.reading import check_recipe, file_of, open_ladder

    check_recipe(open_ladder(*args.ladders), apply_sets(load(args.target), args.set))
    files = [str(file_of(place)) for place in args.ladders]
    words = ["register", "--ladder", *files, "--target", args.target]
    if args.earlier:
        open_ladder(*args.earlier)
        words += ["--earlier", *(str(file_of(place)) for place in args.earlier)]
    words += [word for one in args.set for word in ("--set", one)]
    words += ["--run-dir", str(args.run_dir)] if args.run_dir else []
    words += ["--correct", args.correct] if args.correct else []
    return forecast([*words, *(["--json"] if args.json else [])])


if __name__ == "__main__":
    sys.exit(main())
