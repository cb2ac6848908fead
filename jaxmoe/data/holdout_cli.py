"""`python -m jaxmoe.data holdout`: adds a named held-out set to a data set."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import jaxmoe
from jaxmoe.data.bars import bars
from jaxmoe.data.dataset import open_data_set
from jaxmoe.data.heldout_sets import STRICT, add_set, move_to_set
from jaxmoe.data.heldout_text import Found, from_git, from_packages, from_path, read_pins
from jaxmoe.errors import UserError

__all__ = ["add_parser", "run"]

_EXAMPLES = """examples:
  python -m jaxmoe.data holdout DATASET wiki --from wikitext-2/test.txt
  python -m jaxmoe.data holdout DATASET humaneval --from HumanEval.jsonl.gz
  python -m jaxmoe.data holdout DATASET mine --from notes/ --domain prose
  python -m jaxmoe.data holdout DATASET flax --source '*' --package flax     moved out of sources
  python -m jaxmoe.data holdout DATASET part --source code --share 0.01
  python -m jaxmoe.data holdout DATASET flax --package flax                  as it is installed here
  python -m jaxmoe.data holdout DATASET strict --strict                      this project's own tree
  python -m jaxmoe.data holdout DATASET tree --git REPOSITORY --commit ID
Then `overlap` compares it with the sources: training refuses a set that was not compared.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "holdout",
        help="add a named held-out set",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="the folder of a data set")
    parser.add_argument("name", metavar="NAME", help="of the set")
    where = parser.add_argument_group("where its text comes from")
    where.add_argument("--from", dest="path", metavar="PATH", help="a file or a folder")
    where.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME",
        help="a training source, which loses it; again for more, * for all",
    )
    where.add_argument("--git", metavar="DIR", help="the tree at --commit of a repository")
    where.add_argument("--strict", action="store_true", help="this project's tree, pinned")
    part = parser.add_argument_group("which part of it")
    part.add_argument("--package", action="append", default=[], metavar="NAME")
    part.add_argument("--document", action="append", default=[], metavar="PATTERN", help="* and ?")
    part.add_argument("--share", type=float, default=0.0, help="of a source's documents, by hash")
    part.add_argument("--commit", default="HEAD", metavar="ID")
    part.add_argument("--pins", metavar="FILE", help="SHA-256 and path of the only files to read")
    part.add_argument("--field", action="append", default=[], help="of a .jsonl record; joined")
    part.add_argument("--domain", help="of all documents (default: by file name)")
    parser.add_argument("--replace", action="store_true", help="where there is one of this name")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.set_defaults(own=run)


def run(args: argparse.Namespace) -> int:
    folder = Path(args.dataset).expanduser()
    open_data_set(folder)  # before a lock file is made in somebody else's folder
    _check(args)
    with bars() as report:
        if args.source:
            entry = move_to_set(
                folder,
                args.name,
                args.source,
                report,
                packages=args.package,
                documents=args.document,
                share=args.share,
                replace=args.replace,
            )
        else:
            expected = STRICT.text_fingerprint if args.strict else None
            entry = add_set(
                folder, args.name, _found(args), report, replace=args.replace, expected=expected
            )
    if args.json:
        print(json.dumps({"dataset": str(folder), "name": args.name, **entry}, indent=1))
    else:
        _print(args.name, dict(entry))
    return 0


def _check(args: argparse.Namespace) -> None:
    given = [o for o in ("path", "source", "git", "strict") if getattr(args, o)]
    if len(given) > 1 or not (given or args.package):
        raise UserError("give one of --from, --source, --git, --strict or --package")
    if (args.document or args.share) and not args.source:
        raise UserError("--document and --share choose from a --source; name it")
    if args.package and given not in ([], ["source"]):
        raise UserError("--package chooses from a --source, or from this Python installation")
    if args.source and not (args.package or args.document or args.share > 0):
        raise UserError("--source needs --package, --document or --share: what to hold out of it")
    if not 0 <= args.share < 1:
        raise UserError(f"--share {args.share} is not a part: give 0.01 for 1 %")


def _found(args: argparse.Namespace) -> Found:
    if args.strict:
        return from_git(Path(jaxmoe.__file__).parent.parent, STRICT.commit)
    if args.git:
        return from_git(args.git, args.commit)
    if args.path:
        pins = read_pins(args.pins) if args.pins else None
        return from_path(args.path, fields=args.field, domain=args.domain, pins=pins)
    return from_packages(args.package)


def _print(name: str, entry: dict[str, Any]) -> None:
    table = Table("", "documents", "bytes", "tokens", title=f"held-out set {name}")
    for domain, row in {**entry["domains"], "all": entry}.items():
        table.add_row(domain, *(f"{row[k]:,}" for k in ("documents", "bytes", "tokens")))
    console = Console()
    console.print(table)
    console.print(
        f"text {entry['text_fingerprint']}, xz -9: {entry['xz_bits_per_byte']:.4f} bits per byte"
    )
    for reason, count in entry["skipped"].items():
        console.print(f"skipped: {count:,} {reason}")
