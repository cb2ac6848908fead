"""`data build --out` and `data train-tokenizer`: the arguments, and what is printed."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxmoe.config import DataConfig
from jaxmoe.data import sample
from jaxmoe.data.builder import Plan, Report, build
from jaxmoe.data.cache import cache_root
from jaxmoe.data.dataset import SHARD_BYTES, DataSet, open_data_set
from jaxmoe.data.pieces import parse_source
from jaxmoe.data.tokenizer_files import load_tokenizer, save_tokenizer, train_tokenizer
from jaxmoe.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "add_train_tokenizer", "run_build", "run_train_tokenizer"]

EXAMPLES = """of one's own sources, with --out:
  python -m jaxmoe.data build --source code=src/**/*.py --source notes=docs/ --out data/mine
  python -m jaxmoe.data build --source wiki=dump.jsonl.zst,text=body,id=title --out data/wiki
  python -m jaxmoe.data build --tier small --out data/small --json
"""
_TOKENIZER_EXAMPLES = """examples:
  python -m jaxmoe.data train-tokenizer --tier small --vocab-size 32768 --out mine.tiktoken
  python -m jaxmoe.data train-tokenizer --source notes=docs/ --vocab-size 8192 --out mine.json
"""


def add_arguments(build: argparse.ArgumentParser) -> None:
    """What `data build` takes besides a config."""
    group = build.add_argument_group("a data set of named sources (docs/data.md)")
    _add_sources(group)
    group.add_argument("--out", metavar="DIR", help="the folder to build")
    group.add_argument(
        "--tokenizer", metavar="NAME|FILE", help="default, bytes, or a tokenizer's file"
    )
    group.add_argument("--near-duplicates", action="store_true", help="drop near-duplicates too")
    group.add_argument(
        "--max-malformed", type=_share, default=0.01, metavar="SHARE", help="of records; 0.01"
    )
    group.add_argument("--shard-bytes", type=_positive, default=SHARD_BYTES, metavar="N")
    group.add_argument("--workers", type=_positive, metavar="N", help="default: one a core")
    group.add_argument("--force", action="store_true", help="replace what is in --out")


def add_train_tokenizer(commands: Any) -> None:
    parser = commands.add_parser(
        "train-tokenizer",
        help="learn a byte-level BPE",
        epilog=_TOKENIZER_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(parser)
    parser.add_argument("--vocab-size", type=_positive, default=32_768, metavar="N")
    parser.add_argument(
        "--bytes", type=_positive, default=sample.BYTES, metavar="N", help="of text learnt from"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="*.tiktoken (ranks), or *.json"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def wanted(args: argparse.Namespace) -> bool:
    """Whether this command is one of this module's.

    Raises:
        UserError: options of it stand without sources.
    """
    if args.command != "build":
        return args.command == "train-tokenizer"
    if args.source or args.tier or args.out:
        return True
    if args.tokenizer or args.near_duplicates or args.workers or args.force:
        raise UserError(
            "--tokenizer, --near-duplicates, --workers and --force go with --source or --tier; "
            "of a config, set data.*"
        )
    return False


def run(args: argparse.Namespace) -> None:
    """Raises UserError."""
    if args.command == "train-tokenizer":
        run_train_tokenizer(args)
    else:
        run_build(args)


def run_build(args: argparse.Namespace) -> None:
    if not args.out:
        raise UserError("--source and --tier need --out DIR, where the data set is built")
    if args.set:
        raise UserError(f"--set {args.set[0]}: a data set of --source and --tier has no config")
    tokenizer = load_tokenizer(args.tokenizer or "default")
    with progress() as (report, seconds):
        data = build(
            _plan(args),
            tokenizer,
            Path(args.out),
            _packages(),
            workers=args.workers,
            report=report,
            force=args.force,
        )
        if args.verify:
            report("verify", 0.0)
            open_data_set(args.out, verify=True)
            report("verify", 1.0)
    summary = {**summarise(data), "seconds": seconds}
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        _show(data, summary)


def run_train_tokenizer(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    with progress() as (report, seconds):
        texts, recipe = sample.sample(_plan(args), _packages(), args.bytes, report)
        report("learn", 0.0)
        tokenizer = train_tokenizer(texts, args.vocab_size)
        report("learn", 1.0)
    recipe |= {"command": _command(args), "vocab_size": tokenizer.vocab_size}
    save_tokenizer(tokenizer, out, recipe)
    summary = {
        "file": str(out),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "specials": tokenizer.specials,
        **recipe,
        "seconds": seconds,
    }
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{out}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")


def summarise(data: DataSet) -> dict[str, Any]:
    rows = {
        name: {
            "domain": entry["domain"],
            "documents": entry["documents"],
            "bytes": entry["bytes"],
            "tokens": entry["tokens"],
            "bytes_per_token": round(entry["bytes"] / entry["tokens"], 3),
            "dropped": entry["dropped"],
            "malformed": entry["malformed"],
        }
        for name, entry in data.manifest["sources"].items()
    }
    return {
        "folder": str(data.folder),
        "fingerprint": data.fingerprint,
        "tokenizer": data.manifest["tokenizer"],
        "tokens": sum(r["tokens"] for r in rows.values()),
        "bytes": sum(r["bytes"] for r in rows.values()),
        "sources": rows,
    }


@contextmanager
def progress() -> Iterator[tuple[Report, dict[str, float]]]:
    """A bar a phase on stderr, and the seconds that each phase took."""
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, fraction: float) -> None:
            now = time.monotonic()
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=1.0)
                started[phase] = now
            seconds[phase] = round(now - started[phase], 2)
            bars.update(tasks[phase], completed=fraction)

        yield report, seconds


def _show(data: DataSet, summary: dict[str, Any]) -> None:
    table = Table("source", "domain", "documents", "MB", "tokens", "bytes/token", "left out")
    for name, row in summary["sources"].items():
        bad = {reason: about["n"] for reason, about in row["malformed"].items()}
        left_out = "\n".join(f"{n:,} {reason}" for reason, n in {**row["dropped"], **bad}.items())
        table.add_row(
            name,
            row["domain"],
            f"{row['documents']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['tokens']:,}",
            str(row["bytes_per_token"]),
            left_out or "nothing",
        )
    Console().print(table)
    print(f"{data.folder}: {summary['tokens']:,} tokens, fingerprint {data.fingerprint}")


def _add_sources(parser: Any) -> None:
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=WHERE[,OPTION=VALUE]",
        help="a folder, file or pattern; options kind, text, id, domain, licence, split",
    )
    parser.add_argument(
        "--tier",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="installed, small, base, or a recipe of one's own (TOML)",
    )


def _plan(args: argparse.Namespace) -> Plan:
    return Plan(
        inputs=tuple(map(parse_source, args.source)),
        tiers=tuple(args.tier),
        near_duplicates=getattr(args, "near_duplicates", False),
        max_malformed=getattr(args, "max_malformed", 0.01),
        shard_bytes=getattr(args, "shard_bytes", SHARD_BYTES),
    )


def _packages() -> Path:
    return cache_root(DataConfig()) / "packages"


def _command(args: argparse.Namespace) -> str:
    parts = [f"--source {s}" for s in args.source] + [f"--tier {t}" for t in args.tier]
    parts += [f"--vocab-size {args.vocab_size}", f"--bytes {args.bytes}"]
    return " ".join(["train-tokenizer", *parts])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit("run python -m jaxmoe.data build")
