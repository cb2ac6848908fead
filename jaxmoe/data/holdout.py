"""Which documents are held out, and which training documents repeat them.

Packages are held out by name, and the names are settled on a listing, before any text is read.
"""

import difflib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.data.dataset import fingerprint
from jaxmoe.data.sources import Document, File, Unreadable, read
from jaxmoe.errors import UserError

__all__ = ["Overlap", "Split", "Taken", "checked", "overlap_row", "split", "take"]

SHARE = 0.05  # of the packages, when none are named
FULL = 0.95  # of a cap: past it only ever smaller documents would fit, and bias the sample
WINDOW = 50  # letters and digits (GPT-4 technical report, appendix C)
COMMON = 3  # held-out documents; a passage in so many is a licence header, not a leak
MAX_SHARED = 1_000  # windows of a document that may also be in the held-out text ...
MAX_SHARED_FRACTION = 0.2  # ... and the largest part of its windows
_CHUNK = 1 << 20  # characters hashed at a time


@dataclass(frozen=True, kw_only=True)
class Split:
    packages: tuple[str, ...]  # held out; () when single documents are
    heldout: tuple[File, ...]
    train: tuple[File, ...]


@dataclass(frozen=True, kw_only=True)
class Taken:
    documents: tuple[Document, ...]  # in hash order
    bytes: int
    dropped: dict[str, int]  # reason -> documents (or files, of those never read)


def split(files: Sequence[File], names: Sequence[str], where: str) -> Split:
    """Parts `files` by package: the named ones are held out, or without names 5 % by hash.

    A source with one package is parted by file instead. What hash would hold out is never more
    than half of the bytes.

    Raises:
        UserError: a name that is no package, nothing left to train on, or fewer than two files.
    """
    packages = sorted({f.package for f in files})
    if names:
        chosen = set(names)
        for name in sorted(chosen.difference(packages)):
            raise UserError(f"data.holdout: {where} has no package {name!r}{_near(name, packages)}")
        if len(chosen) == len(packages):
            raise UserError(f"data.holdout names every package of {where}: leave some to train on")
        return _part(files, {f.name for f in files if f.package in chosen}, tuple(sorted(chosen)))
    if len(files) < 2:
        raise UserError(
            f"data.path={where} has one document, {files[0].name}, and one must be held out: "
            "cut it into two or more files"
        )
    if len(packages) == 1:
        return _part(files, _by_hash({f.name: f.size for f in files}), ())
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.package] += file.size
    chosen = _by_hash(sizes)
    return _part(files, {f.name for f in files if f.package in chosen}, tuple(sorted(chosen)))


def take(
    files: Iterable[File],
    cap: int,
    refuse: Callable[[Document], str | None],
    progress: Callable[[float], None] = lambda fraction: None,
) -> Taken:
    """Reads whole files in hash order until `cap` bytes are nearly full.

    The order depends on names alone: other versions of the same packages give a similar choice.
    `refuse` gives the reason to leave a document out, or None.
    """
    documents: list[Document] = []
    dropped: Counter[str] = Counter()
    total = 0
    for file in sorted(files, key=lambda f: _order(f.name)):
        if total >= FULL * cap or file.size > cap - total:
            dropped["over the cap"] += 1
            continue
        try:
            found = read(file)
        except Unreadable as error:
            dropped[str(error)] += 1
            continue
        for document in found:
            reason = refuse(document)
            if reason:
                dropped[reason] += 1
                continue
            documents.append(document)
            total += len(document.data)
        progress(total / cap)
    return Taken(documents=tuple(documents), bytes=total, dropped=dict(sorted(dropped.items())))


def checked(manifest: Mapping[str, Any], heldout_fingerprint: str, train_fingerprint: str) -> int:
    """Documents that were found to repeat held-out text, and were left in the training text.

    Args:
        manifest: of a data set, whose every source must have been compared.
        heldout_fingerprint: of a set's text; of a part of it (after a slash) the whole counts.
        train_fingerprint: of what will be trained on.

    Raises:
        UserError: the set was not compared with exactly this training text.
    """
    rows = manifest.get("overlap", {}).get(heldout_fingerprint.partition("/")[0], {})
    mend = "run python -m jaxmoe.data overlap on the data set"
    if train_fingerprint != fingerprint(manifest):
        raise UserError(
            f"training text {train_fingerprint} is not the data set's, {fingerprint(manifest)}: it"
            f" changed since it was opened; {mend}, and start again"
        )
    wanted = {f"source {n!r}": e["fingerprint"] for n, e in manifest["sources"].items()}
    missing = [name for name, print_ in wanted.items() if print_ not in rows]
    if missing:
        sets = manifest.get("heldout", {}).items()
        named = [f"{n} " for n, e in sets if heldout_fingerprint.startswith(e["text_fingerprint"])]
        raise UserError(
            f"held-out set {''.join(named[:1])}{heldout_fingerprint} was not compared with"
            f" {', '.join(missing)} of data {train_fingerprint}: {mend}"
        )
    return sum(rows[print_]["leaking"] for print_ in wanted.values())


def overlap_row(documents: int, dropped: int) -> dict[str, Any]:
    """What the manifest of a prepared text says of the check by `Overlap`."""
    limits = {"windows": MAX_SHARED, "share": MAX_SHARED_FRACTION}
    counts = {"documents": documents, "leaking": 0, "dropped": dropped}
    return {"method": "chars50, case kept", "common": COMMON, "limits": limits, **counts}


class Overlap:
    """Finds passages of the held-out text: windows of 50 letters and digits, hashed.

    About 20 MB of text a second on one core, 16 bytes of memory a held-out window.
    """

    def __init__(self, documents: Iterable[bytes]) -> None:
        each = [np.unique(_windows(data)) for data in documents]
        joined = np.concatenate([np.empty(0, np.uint64), *each])
        hashes, counts = np.unique(joined, return_counts=True)
        self._hashes = hashes[counts < COMMON]
        self._maybe = np.zeros(1 << 22, bool)  # by the top 22 bits: cheap, and seldom wrong
        self._maybe[self._hashes >> np.uint64(42)] = True

    def shared(self, data: bytes) -> tuple[int, int]:
        """(windows of `data` that are in the held-out text, windows of `data`)."""
        windows = _windows(data)
        suspects = windows[self._maybe[windows >> np.uint64(42)]]
        if not len(suspects) or not len(self._hashes):
            return 0, len(windows)
        at = np.searchsorted(self._hashes, suspects).clip(max=len(self._hashes) - 1)
        return int(np.count_nonzero(self._hashes[at] == suspects)), len(windows)

    def leaks(self, data: bytes) -> bool:
        """Whether so much of `data` is held-out text that it must not be trained on."""
        hits, windows = self.shared(data)
        return hits > min(MAX_SHARED, MAX_SHARED_FRACTION * windows)


def _part(files: Sequence[File], heldout: set[str], packages: tuple[str, ...]) -> Split:
    return Split(
        packages=packages,
        heldout=tuple(f for f in files if f.name in heldout),
        train=tuple(f for f in files if f.name not in heldout),
    )


def _by_hash(sizes: dict[str, int] | Counter[str]) -> set[str]:
    wanted = max(1, round(SHARE * len(sizes)))
    half = sum(sizes.values()) / 2
    chosen: set[str] = set()
    for name in sorted(sizes, key=_order):
        if len(chosen) < wanted and sum(sizes[c] for c in chosen) + sizes[name] <= half:
            chosen.add(name)
    return chosen


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _near(name: str, packages: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, packages, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(packages[:8])} ..."


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(bytes kept [256] bool, their values [256], powers of the base, their inverses), uint64."""
    rng = np.random.default_rng(50)
    kept = np.array([chr(b).isalnum() or b >= 128 for b in range(256)])
    values = rng.integers(1, 2**63, 256, np.uint64)
    base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
    size = _CHUNK + WINDOW
    powers = np.full(size, base, np.uint64).cumprod()
    inverses = np.full(size, pow(base, -1, 2**64), np.uint64).cumprod()
    return kept, values, powers, inverses


def _windows(data: bytes) -> np.ndarray:
    """[max(0, letters and digits - 49)] uint64: a polynomial hash of every window, modulo 2**64."""
    kept, values, powers, inverses = _tables()
    raw = np.frombuffer(data, np.uint8)
    letters = values[raw[kept[raw]]]
    count = len(letters) - WINDOW + 1
    out = np.empty(max(0, count), np.uint64)
    for start in range(0, count, _CHUNK):
        part = letters[start : start + _CHUNK + WINDOW - 1]
        sums = np.concatenate([np.zeros(1, np.uint64), (part * powers[: len(part)]).cumsum()])
        hashes = (sums[WINDOW:] - sums[:-WINDOW]) * inverses[: len(sums) - WINDOW]
        out[start : start + len(hashes)] = hashes
    return out
