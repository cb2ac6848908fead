"""`python -m jaxmoe.report RUN`: writes the page about a run. `report diff A B`: diff.py."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.report import diff, page, records

EXAMPLE = """example:
  python -m jaxmoe.report runs/first                   writes runs/first/report.html
  python -m jaxmoe.report diff runs/first runs/again   from which step and layer they differ
  python -m jaxmoe.report runs/first --out /tmp/a.html --json | jq .bits_per_byte
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["diff"]:
        return diff.main(words[1:])
    args = _parser().parse_args(words)
    try:
        out = page.write(args.run, args.out)
        headline = page.summary(records.read(args.run)) if args.json else {}
    except (UserError, OSError) as error:
        print(f"jaxmoe.report: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"report": str(out), **headline}, indent=2) if args.json else out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.report",
        description="Writes one self-contained HTML page about a run, finished or in progress.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of RUN/report.html")
    parser.add_argument("--json", action="store_true", help="print the headline numbers as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
