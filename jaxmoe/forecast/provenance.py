"""Which code made a forecast."""

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["code_fingerprint"]


@cache
def code_fingerprint() -> str:
    """16 hex digits of the SHA-256 over every source file of the package, by its path.

    It needs no git: an installed copy and a checkout of the same files agree.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:16]
