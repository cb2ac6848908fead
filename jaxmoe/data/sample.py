"""A fair sample of a plan's text, for training a tokenizer: as much of each domain."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe.data import pieces, units
from jaxmoe.data.builder import Plan, listing
from jaxmoe.data.readers import Text, read_piece, unpack
from jaxmoe.errors import UserError

__all__ = ["BYTES", "sample"]

BYTES = 100_000_000
_PART = 16_000_000  # bytes of a large file read at a time
_PACKAGE_SHARE = 0.25  # of a domain's part: no package decides the merges alone


def sample(
    plan: Plan, cache: Path, size: int, report: Callable[[str, float], None]
) -> tuple[list[str], dict[str, Any]]:
    """Whole documents of about `size` bytes together, and what they are: bytes by domain.

    Files are read in the order of their names' hashes, and identical documents once. Packages of
    more than a quarter of a domain's part are only taken where the others do not fill it.

    Raises:
        UserError: there is no text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listed = listing(plan, cache, Path(scratch))
        domains = {name: about["domain"] for name, about in listed.sources.items()}
        part = size // len(set(domains.values()))
        wanted = dict.fromkeys(set(domains.values()), part)
        plain = _unpacked(listed.pieces, Path(scratch))
        texts: list[str] = []
        later: list[Text] = []
        got: Counter[str] = Counter()
        packages: Counter[tuple[str, str]] = Counter()
        seen: set[bytes] = set()
        for piece in units.expand(listed.pieces, plain, _PART):
            if all(got[d] >= n for d, n in wanted.items()):
                break
            if got[domains[piece.source]] >= part and got[domains.get(piece.split, "")] >= part:
                continue
            for record in read_piece(piece):
                if not isinstance(record, Text):
                    continue
                sha256 = hashlib.sha256(record.data).digest()
                if sha256 in seen:
                    continue
                seen.add(sha256)
                domain = domains[record.source]
                if packages[domain, record.package] > _PACKAGE_SHARE * part:
                    later.append(record)
                elif got[domain] < part:
                    _take(record, domain, texts, got)
                    packages[domain, record.package] += len(record.data)
            report("read", min(1.0, sum(got.values()) / size))
    for record in later:
        if got[domains[record.source]] < part:
            _take(record, domains[record.source], texts, got)
    if not texts:
        raise UserError("no text to learn from: every file of the sources was left out")
    return texts, {"bytes": dict(sorted(got.items())), "documents": len(texts)}


def _take(record: Text, domain: str, texts: list[str], got: Counter[str]) -> None:
    texts.append(record.data.decode())
    got[domain] += len(record.data)


def _unpacked(every: list[pieces.Piece], scratch: Path) -> dict[str, Path]:
    plain: dict[str, Path] = {}
    for number, piece in enumerate(p for p in every if pieces.packed(p)):
        plain[piece.path] = scratch / f"{number}.plain"
        unpack(Path(piece.path), plain[piece.path])
    return plain
