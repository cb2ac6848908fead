"""Data sets on disk, built once: found by a fingerprint of their sources and settings.

CACHE/KEY/          as `build` writes it; it appears whole, by a rename, or not at all
CACHE/KEY.lock      held by the process that builds; the others wait
CACHE/KEY.tmp-*     a build under way, or what a killed one left (the next build removes it)
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxmoe.config import DataConfig
from jaxmoe.data import sources
from jaxmoe.data.build import (
    FORMAT,
    MANIFEST,
    Report,
    files_fingerprint,
    named_tokenizer,
    sync_folder,
    write,
)
from jaxmoe.data.damage import Guard
from jaxmoe.data.store import Source
from jaxmoe.data.tokenizer import Tokenizer
from jaxmoe.errors import UserError

__all__ = ["Corpus", "HeldOut", "Texts", "load", "prepare"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Documents of one domain."""

    tokens: np.ndarray  # [tokens]: eot, then every document followed by eot
    ends: np.ndarray  # [documents] int64: where in `tokens` each ends, its eot included
    sizes: np.ndarray  # [documents] int64: bytes of UTF-8 text


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    name: str
    tokens: np.ndarray  # [tokens]: eot, then every document followed by eot
    bytes: int  # of UTF-8 text
    # Of the text: the same under every tokenizer. A part of a set has more after a slash.
    fingerprint: str
    xz_bits_per_byte: float  # of exactly these bytes, preset 9; of a part: of the whole
    domains: Mapping[str, Texts] = field(default_factory=dict)  # empty: not known


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A data set. Losses are only comparable between runs with the same `fingerprint`."""

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    train: np.ndarray  # [tokens] memmap: eot, then every document followed by eot
    heldout: HeldOut
    fingerprint: str  # 16 hex digits over the SHA-256 of every file
    # Of a data set of several sources, by name; then `train` is not streamed. Names of documents
    # are indexed like them.
    sources: Mapping[str, Source] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[HeldOut, ...] = ()  # further held-out sets
    guard: Guard | None = None  # of shards that are compared as they are read


class _Broken(Exception):
    """A folder that is not a whole data set of this format."""


def prepare(
    config: DataConfig, vocab_size: int, report: Report | None = None, *, verify: bool = False
) -> Corpus:
    """The data set of `config`, from the cache or built into it.

    Several processes may call this at once: one builds. A damaged data set is built again, and
    `report` gets a phase that says so. `verify` reads every file and compares SHA-256 sums.

    Raises:
        UserError: the sources cannot be used, or the cache cannot be written.
    """
    report = report or (lambda phase, fraction: None)
    report("list", 0.0)
    listing = sources.installed() if config.path is None else sources.folder(config.path)
    report("list", 1.0)
    root = cache_root(config)
    folder = root / _key(config, vocab_size, listing)
    try:
        return _open(folder, verify)
    except _Broken:
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(folder, report):
            return _open_or_build(folder, config, vocab_size, listing, report, verify)
    except PermissionError as error:
        raise UserError(f"cache {root}: {error}; set data.cache or $JAXMOE_CACHE") from error


def load(folder: str | Path, *, verify: bool = False) -> Corpus:
    """The data set in `folder`, a sub-folder of a cache.

    Raises:
        UserError: it is not whole; the message names the file and the mend.
    """
    try:
        return _open(Path(folder), verify)
    except _Broken as error:
        raise UserError(f"{folder}: {error}; delete this folder, and it is built again") from None


def _open_or_build(
    folder: Path,
    config: DataConfig,
    vocab_size: int,
    listing: sources.Listing,
    report: Report,
    verify: bool,
) -> Corpus:
    """With the lock held: another process may have built it meanwhile."""
    try:
        return _open(folder, verify)
    except _Broken as error:
        if folder.exists():
            report(f"building again: {error}", 0.0)
            shutil.rmtree(folder)
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)  # its builder died: we hold the lock that it held
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        write(unfinished, config, vocab_size, listing, report)
        os.chmod(unfinished, 0o755)  # mkdtemp's folders are private; a cache may be shared
        os.rename(unfinished, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _open(folder, verify)


def _locked(folder: Path, report: Report) -> Any:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for the process that builds it", 0.0)
        return lock.acquire(poll_interval=0.2)


def _open(folder: Path, verify: bool) -> Corpus:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise _Broken(f"{MANIFEST}: {type(error).__name__}") from None
    if manifest.get("format") != FORMAT:
        raise _Broken(f"{MANIFEST}: format {manifest.get('format')} is not {FORMAT}")
    if "overlap" not in manifest:  # of before it was recorded: the same bytes are built again
        raise _Broken(f"{MANIFEST}: it does not say what the held-out text was compared with")
    for name, expected in manifest["files"].items():
        _check(folder / name, expected, verify)
    tokenizer = Tokenizer((folder / "tokenizer.json").read_text())
    dtype = np.dtype(manifest["tokenizer"]["dtype"])
    held = manifest["holdout"]
    return Corpus(
        folder=folder,
        manifest=manifest,
        tokenizer=tokenizer,
        train=np.memmap(folder / "train.bin", dtype, mode="r"),
        heldout=HeldOut(
            name="holdout",
            tokens=np.fromfile(folder / "holdout.bin", dtype),
            bytes=held["bytes"],
            fingerprint=held["fingerprint"],
            xz_bits_per_byte=held["xz_bits_per_byte"],
        ),
        fingerprint=files_fingerprint(manifest["files"]),
    )


def _check(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected["bytes"]:
        raise _Broken(f"{path.name} has {size} bytes instead of {expected['bytes']}")
    if verify:
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected["sha256"]:
            raise _Broken(f"{path.name} has changed: its SHA-256 is {found}")


def cache_root(config: DataConfig) -> Path:
    """Where prepared data and compiled programs are kept."""
    named = config.cache or os.environ.get("JAXMOE_CACHE") or "~/.cache/jaxmoe"
    return Path(named).expanduser().resolve()


def _key(config: DataConfig, vocab_size: int, listing: sources.Listing) -> str:
    """Names and times stand for the contents: reading 70 MB at each start would be too slow."""
    tokenizer: object = config.tokenizer
    if tokenizer == "bpe":
        tokenizer = ["bpe", config.tokenizer_bytes, vocab_size]
    elif tokenizer != "bytes":  # a file may change under its name
        tokenizer = [named_tokenizer(config, vocab_size).fingerprint]
    return _digest(
        {
            "format": FORMAT,
            "holdout": sorted(set(config.holdout)),
            "tokenizer": tokenizer,
            "max_bytes": config.max_bytes,
            "holdout_bytes": config.holdout_bytes,
            "files": [[f.package, f.name, f.size, f.mtime_ns] for f in listing.files],
        }
    )


def _digest(tree: Any) -> str:
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
