"""Reading what somebody else wrote: what is wrong with it is one line that names the file.

Files of a run, a data set or a checkpoint may be cut, edited or made to do harm. They are JSON,
arrays and text, never code; here is what turns the ways in which they can be wrong into a
`UserError`, so that nobody reads them with a traceback.
"""

import csv
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError

__all__ = ["LARGEST", "finite", "group", "json_object", "loads", "needed", "plain_name", "reading"]

# What code raises that meets another value than it was written for.
UNFIT = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError),
    *(RecursionError, EOFError, zlib.error, csv.Error),
)
LARGEST = 1 << 1000  # below the largest float
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,200}")  # file systems take 255 bytes


def loads(text: str | bytes) -> Any:
    """json.loads, whose every failure is a ValueError: of nesting it is a RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


@contextmanager
def reading(where: Any, mend: str = "bring it back as it was written") -> Iterator[None]:
    """What goes wrong in the block as a UserError that names `where`.

    For blocks that do nothing but look at what came from there: a value of another type fails
    where it is used.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; {mend}") from None
    except UNFIT as error:
        raise UserError(f"{where}: {type(error).__name__}: {str(error)[:200]}; {mend}") from None


def json_object(path: Path, mend: str = "bring it back as it was written") -> dict[str, Any]:
    """Raises UserError: no such file, not JSON, or not an object."""
    with reading(path, mend):
        found = loads(path.read_bytes())
    if not isinstance(found, dict):
        raise UserError(f"{path}: it holds {type(found).__name__}, no JSON object; {mend}")
    return found


def group(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty if there is none."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def needed(row: Mapping[str, Any], kinds: Mapping[str, Any], where: Any) -> None:
    """Raises UserError unless each key is there with a value of its type (or types); bool is no
    number, and an int is small enough for arithmetic with floats."""
    for key, kind in kinds.items():
        value = row.get(key)
        fits = key in row and isinstance(value, kind) and not isinstance(value, bool)
        if not fits or isinstance(value, int) and abs(value) >= LARGEST:
            raise UserError(f"{where}: {key}={value!r:.80}; bring the file back as it was written")


def finite(value: Any) -> bool:
    """Whether it is a number that floats can be reckoned with: JSON also has 10**400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)


def plain_name(name: str) -> bool:
    """Whether a name is that of one file or folder, and leads nowhere else."""
    return bool(_NAME.fullmatch(name)) and name not in (".", "..")
