"""`python -m jaxmoe.restarts -- ARGUMENTS OF TRAIN`: may a scheduler start this run once more?

A scheduler that starts a job again knows nothing of steps. This looks at the run directory as
`jaxmoe.supervise` does: a step that was never logged or saved before is progress, and after
PATIENCE starts in a row without any it says no. Starts are kept beside the run directory, by job,
in RUN.starts-JOB, and forgotten with --forget. launch/slurm.sh asks before each start and after
each end that is not final; the config is loaded too, so that a mistake in it is told once, by one
process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmoe import config as config_lib
from jaxmoe import exits
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.supervise import PATIENCE, furthest_step

EXAMPLES = f"""examples:
  python -m jaxmoe.restarts --job 123 --note -- --config configs/target.py --run-dir runs/target
                              before a start, which is noted
  python -m jaxmoe.restarts --job 123 -- --run-dir runs/target
                              after it: is another one of use?
  python -m jaxmoe.restarts --job 123 --forget -- --run-dir runs/target

exit codes: 0 yes, 2 a mistake in the config, 4 no: {PATIENCE} starts without a step forward"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    words = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    try:
        run_dir = _run_dir(words)
        starts = run_dir.with_name(f"{run_dir.name}.starts-{args.job}")
        if args.forget:
            starts.unlink(missing_ok=True)
            return exits.DONE
        return _answer(run_dir, starts, args.patience, note=args.note)
    except UserError as error:
        print(f"jaxmoe.restarts: {error}", file=sys.stderr)
        return exits.MISTAKE


def fruitless(starts: Sequence[int], step: int) -> int:
    """Starts in a row, up to the last, that began no earlier than where the run is now.

    Args:
        starts: the furthest step that was known at each start.
        step: the furthest one now.
    """
    count = 0
    while count < len(starts) and starts[-1 - count] >= step:
        count += 1
    return count


def _answer(run_dir: Path, starts: Path, patience: int, *, note: bool) -> int:
    before = [int(word) for word in starts.read_text().split()] if starts.exists() else []
    # A start that resumed from further back has dropped lines that an earlier one had written.
    step = max(furthest_step(run_dir), *before, 0)
    if fruitless(before, step) >= patience:
        print(
            f"jaxmoe.restarts: {run_dir}: {patience} starts in a row with nothing beyond step"
            f" {step}, giving up; look at the log and the last events, mend it and submit again",
            file=sys.stderr,
        )
        starts.unlink()
        return exits.NO_PROGRESS
    if note:
        try:
            starts.parent.mkdir(parents=True, exist_ok=True)
            with open(starts, "a") as out:
                out.write(f"{step}\n")
        except OSError as error:
            raise UserError(f"{starts}: {error.strerror}; --run-dir must be writable") from error
    return exits.DONE


def _run_dir(words: Sequence[str]) -> Path:
    """What train would make of its arguments.

    Raises:
        UserError: it would refuse the config.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    known, _ = parser.parse_known_args(words)
    config = None
    if known.config is not None:
        config = config_lib.apply_sets(config_lib.load(known.config), known.set)
        check(config)
    if known.run_dir is not None:
        return known.run_dir
    if config is None:
        raise UserError("neither --run-dir nor --config among the arguments; say where the run is")
    return Path("runs") / config.name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.restarts",
        description="Tells whether another start of a run is of use.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--job", required=True, metavar="ID", help="whose starts are counted")
    parser.add_argument("--note", action="store_true", help="one begins now: note it")
    parser.add_argument("--forget", action="store_true", help="the job is over")
    starts = f"starts without a step forward before the answer is no (default {PATIENCE})"
    parser.add_argument("--patience", type=int, default=PATIENCE, metavar="N", help=starts)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
