"""Whether the files of a data set are as they were written: sizes and SHA-256 sums."""

import argparse
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxmoe.data.bars import bars
from jaxmoe.data.dataset import MANIFEST
from jaxmoe.data.remote import Store, is_url
from jaxmoe.errors import UserError
from jaxmoe.outside import loads, needed, plain_name

__all__ = ["Verdict", "add_parser", "run", "verify"]

_EXAMPLES = """examples:
  python -m jaxmoe.data verify DIR            a data set, or a folder of the cache
  python -m jaxmoe.data verify gs://BUCKET/DIR
  python -m jaxmoe.data verify DIR --json
Exit code 1 if a file is damaged.
"""
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Verdict:
    file: str
    bytes: int  # as they should be
    fault: str | None  # None: whole


def verify(
    folder: str | Path, report: Callable[[str, float], None] = lambda phase, fraction: None
) -> list[Verdict]:
    """Reads every file that the manifest in `folder`, or at a URL, names, several at a time.

    Raises:
        UserError: no manifest, or one that names no files.
    """
    store = Store(str(folder)) if is_url(str(folder)) else None
    folder = Path(folder).expanduser()
    files = _files(folder, store)
    total = max(1, sum(row["bytes"] for row in files.values()))
    lock, done = threading.Lock(), 0

    def read(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            report("verify", min(1.0, done / total))

    def one(item: tuple[str, Mapping[str, Any]]) -> Verdict:
        name, row = item
        parts = _local(folder / name) if store is None else store.parts(name, row["bytes"])
        fault = _fault(parts, row, read)
        return Verdict(file=name, bytes=row["bytes"], fault=fault)

    # Hashing releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(one, sorted(files.items())))


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare every file's SHA-256",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="with a manifest.json in it, or a URL")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.set_defaults(own=run)


def run(args: argparse.Namespace) -> int:
    with bars() as report:
        verdicts = verify(args.folder, report)
    damaged = [v for v in verdicts if v.fault is not None]
    if args.json:
        print(json.dumps({"damaged": len(damaged), "files": [asdict(v) for v in verdicts]}))
        return 1 if damaged else 0
    table = Table("file", "bytes", "verdict")
    for verdict in verdicts:
        table.add_row(verdict.file, f"{verdict.bytes:,}", verdict.fault or "whole")
    console = Console()
    console.print(table)
    console.print(f"{len(damaged)} of {len(verdicts)} files are damaged")
    return 1 if damaged else 0


def _files(folder: Path, store: Store | None) -> dict[str, Mapping[str, Any]]:
    path = folder / MANIFEST if store is None else store.url + MANIFEST
    try:
        text = Path(path).read_bytes() if store is None else store.whole(MANIFEST)
        if text is None:
            raise FileNotFoundError
        files = loads(text)["files"]
        for name, row in files.items():
            if not plain_name(name):
                raise ValueError(f"file {name!r} is not in the folder itself")
            needed(row, {"bytes": int, "sha256": str}, f"{path}: file {name}")
        return files
    except FileNotFoundError:
        raise UserError(
            f"{store.url if store else folder}: no {MANIFEST} in it; give the folder of a data set"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error!r}; build the data set again") from None


def _local(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            yield block


def _fault(
    parts: Iterator[bytes | None], row: Mapping[str, Any], read: Callable[[int], None]
) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        for part in parts:
            if part is None:  # of a store, which does not tell how many bytes there are
                return f"is missing, or has not {row['bytes']:,} bytes"
            digest.update(part)
            size += len(part)
            read(len(part))
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if size != row["bytes"]:
        return f"has {size:,} bytes instead of {row['bytes']:,}"
    if digest.hexdigest() != row["sha256"]:
        return f"has changed: its SHA-256 is {digest.hexdigest()[:16]}..."
    return None
