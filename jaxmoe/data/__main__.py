"""python -m jaxmoe.data: builds the data set of a config, and shows what is in it."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxmoe
from jaxmoe.config import Config
from jaxmoe.data import build_cli, holdout_cli, inspect, overlap_cli, verify
from jaxmoe.data.build import HELD_OUT, Report
from jaxmoe.data.cache import prepare
from jaxmoe.data.corpus import TRAIN, Corpus
from jaxmoe.data.opened import open_corpus
from jaxmoe.errors import UserError

_EXAMPLES = """examples:
  python -m jaxmoe.data build
  python -m jaxmoe.data build --set data.path=books --set "data.holdout=()"
  python -m jaxmoe.data build --config configs/quickstart.py:tiny --json
  python -m jaxmoe.data inspect runs/quickstart --step 420
  python -m jaxmoe.data inspect --position 1000 --rows 2
  python -m jaxmoe.data holdout DATASET wiki --from wikitext-2/test.txt
  python -m jaxmoe.data overlap DATASET --drop
  python -m jaxmoe.data verify DATASET
"""
_EXAMPLES += build_cli.EXAMPLES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. 0 on success, 2 with one line on stderr for a user's mistake."""
    args = _parser().parse_args(argv)
    try:
        if own := getattr(args, "own", None):  # a command without a config
            return own(args)
        if build_cli.wanted(args):
            build_cli.run(args)
            return 0
        config = inspect.config_of(args)
        if args.command == "build":
            _build(config, args)
        else:
            _inspect(config, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.data", description=__doc__, epilog=_EXAMPLES, formatter_class=shown
    )
    default = Path(jaxmoe.__file__).parent.parent / "configs" / "quickstart.py"
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", default=str(default), metavar="FILE[:FN]", help="default: configs/quickstart.py"
    )
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    common.add_argument("--json", action="store_true", help="print JSON, for scripts")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="build the cache, or check that it is there",
        parents=[common],
        epilog=_EXAMPLES,
        formatter_class=shown,
    )
    build_cli.add_arguments(build)
    build_cli.add_train_tokenizer(commands)
    build.add_argument("--verify", action="store_true", help="compare every file's SHA-256")
    inspect.add_parser(commands, [common], _natural)
    for command in (holdout_cli, overlap_cli, verify):
        command.add_parser(commands)
    return parser


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _build(config: Config, args: argparse.Namespace) -> None:
    with _progress() as (report, seconds):
        corpus = prepare(config.data, config.model.vocab_size, report, verify=args.verify)
    summary = _summary(corpus, seconds)
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    table = Table("", "", title="data set", show_header=False)
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), _cell(value))
    Console().print(table)


def _inspect(config: Config, args: argparse.Namespace) -> None:
    with _progress() as (report, _):
        corpus = open_corpus(config, report)
    inspect.run(config, corpus, args)


@contextmanager
def _progress() -> Iterator[tuple[Report, dict[str, float]]]:
    """A bar a phase on stderr, and the seconds that each phase took."""
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, fraction: float) -> None:
            now = time.monotonic()
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=1.0)
                started[phase] = now
            seconds[phase] = round(now - started[phase], 2)
            bars.update(tasks[phase], completed=fraction)

        yield report, seconds


def _summary(corpus: Corpus, seconds: dict[str, float]) -> dict[str, Any]:
    train, held = corpus.manifest["sources"][TRAIN], corpus.manifest["heldout"][HELD_OUT]
    return {
        "folder": str(corpus.folder),
        "fingerprint": corpus.fingerprint,
        "held_out": held["origin"]["names"],
        "holdout_documents": held["documents"],
        "holdout_bytes": held["bytes"],
        "holdout_tokens": held["tokens"],
        "holdout_bytes_per_token": round(held["bytes"] / held["tokens"], 3),
        "holdout_xz_bits_per_byte": round(held["xz_bits_per_byte"], 4),
        "holdout_dropped": held["skipped"],
        "train_packages": len(train["packages"]),
        "train_documents": train["documents"],
        "train_bytes": train["bytes"],
        "train_prose_bytes": train["domains"].get("prose", {}).get("bytes", 0),
        "train_tokens": train["tokens"],
        "train_bytes_per_token": round(train["bytes"] / train["tokens"], 3),
        "train_dropped": train["dropped"],
        "skipped": corpus.manifest["skipped"],
        "tokenizer": f"{corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size} ids",
        "seconds": seconds,
    }


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return "\n".join(f"{_cell(v)} {k}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:12]))
        return shown + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
