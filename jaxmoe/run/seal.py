"""The SHA-256 of every file of a checkpoint, written into it before it becomes visible.

The storage underneath notices a missing or shortened file, but not a changed byte in the values of
an array: those came back as other numbers. Process 0 reads each file once more for this.
"""

import hashlib
import json
from pathlib import Path

from jaxmoe.outside import loads

FILE = "sha256.json"


def write(folder: Path, items: tuple[str, ...]) -> None:
    """Seals the files in the sub-folders `items`."""
    (folder / FILE).write_text(json.dumps(_sums(folder, items), indent=1))


def problem(folder: Path, items: tuple[str, ...]) -> str | None:
    """What is not as it was sealed; None if all is."""
    try:
        sealed = loads((folder / FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{FILE}: {type(error).__name__}"
    if not isinstance(sealed, dict):
        return f"{FILE}: it holds no object"
    found = _sums(folder, items)
    for name in sorted({*sealed, *found}):
        if name not in found:
            return f"{name} is missing"
        if found[name] != sealed.get(name):
            return f"{name} has changed: its SHA-256 is {found[name][:12]}"
    return None


def _sums(folder: Path, items: tuple[str, ...]) -> dict[str, str]:
    files = (file for item in items for file in (folder / item).rglob("*") if file.is_file())
    # The mark of orbax that an item is complete may come after the seal.
    return {
        file.relative_to(folder).as_posix(): _sum(file)
        for file in files
        if file.name != "commit_success.txt"
    }


def _sum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
