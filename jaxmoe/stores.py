"""Folders at URLs, as tensorstore opens them: gs://, s3://, http(s)://, file://."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError

__all__ = ["SHORT", "key_range", "opened", "said"]

# tensorstore's own repetitions of a request, for seconds; by itself it goes on for many minutes.
_FEW = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "1s"}
SHORT = {f"{driver}_request_retries": _FEW for driver in ("gcs", "s3", "http")}


def opened(place: str, context: Mapping[str, Any] | None = None) -> Any:
    """The tensorstore.KvStore of a folder; nothing is asked of it yet.

    Args:
        place: a URL, or the JSON text of a tensorstore specification, which can say more, such as
            the `endpoint` of an S3 that is not Amazon's.
        context: tensorstore's settings, such as SHORT.

    Raises:
        UserError: no store can have such a place.
    """
    tensorstore = _tensorstore()
    try:
        spec = _folder(place)
        return tensorstore.KvStore.open(spec, context=tensorstore.Context(context or {})).result()
    except ValueError as error:  # tensorstore's of anything that goes wrong, and that of JSON
        raise UserError(f"{place}: {said(error)}") from None


def key_range(prefix: str) -> Any:
    """All keys that begin with `prefix`."""
    return _tensorstore().KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def said(error: BaseException) -> str:
    """tensorstore's message in one line, without where in its source it was made."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(" [")[0][:300]


def _folder(place: str) -> Any:
    if not place.startswith("{"):
        return place if place.endswith("/") else place + "/"
    spec = json.loads(place)
    path = spec.get("path", "")
    return {**spec, "path": path if not path or path.endswith("/") else path + "/"}


@functools.cache
def _tensorstore() -> Any:
    import tensorstore  # half a second, and only where a URL is opened

    return tensorstore
