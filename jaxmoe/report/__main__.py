"""`python -m jaxmoe.report RUN...`: a page about a run, or about several side by side.

`report diff A B`: diff.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.report import compare, diff, page, records

EXAMPLE = """example:
  python -m jaxmoe.report runs/first                   writes runs/first/report.html
  python -m jaxmoe.report runs/first runs/second       several side by side: comparison.html
  python -m jaxmoe.report runs/target --ladder ladders/moe
                                                       with the ladder that it was forecast from
  python -m jaxmoe.report diff runs/first runs/again   from which step and layer they differ
  python -m jaxmoe.report runs/first --out /tmp/a.html --json | jq .bits_per_byte
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["diff"]:
        return diff.main(words[1:])
    args = _parser().parse_args(words)
    try:
        out, headline = _written(args)
    except (UserError, OSError) as error:
        print(f"jaxmoe.report: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"report": str(out), **headline}, indent=2) if args.json else out)
    return 0


def _written(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Where the page is, and the headline for scripts."""
    if len(args.runs) == 1:
        (run,) = args.runs
        out = page.write(run, args.out, args.ladder)
        return out, page.summary(records.read(run)) if args.json else {}
    out = compare.write(args.runs, args.out or Path("comparison.html"), args.ladder)
    every = [page.summary(records.read(run)) for run in args.runs] if args.json else []
    return out, {"runs": every}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.report",
        description="Writes one self-contained HTML page about a run, finished or in progress, or "
        "about several side by side.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    where = "instead of RUN/report.html, or comparison.html for several"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    fit = (
        "folder of a ladder whose fit is shown with the runs that were forecast before their start"
    )
    parser.add_argument("--ladder", type=Path, action="append", default=[], metavar="DIR", help=fit)
    parser.add_argument("--json", action="store_true", help="print the headline numbers as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
