"""Text folders as data sets, prepared once: found by a fingerprint of their files and settings.

CACHE/KEY/          as `build` writes it; it appears whole, by a rename, or not at all
CACHE/KEY.lock      held by the process that builds; the others wait
CACHE/KEY.tmp-*     a build under way, or what a killed one left (the next build removes it)
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import filelock

from jaxmoe.config import DataConfig
from jaxmoe.data import sources
from jaxmoe.data.build import VERSION, Report, named_tokenizer, write
from jaxmoe.data.corpus import Corpus, HeldOut, Texts
from jaxmoe.data.damage import open_guarded
from jaxmoe.data.dataset import FORMAT, digest, open_data_set, sync_folder
from jaxmoe.data.heldout_sets import corpus_of
from jaxmoe.errors import UserError

__all__ = ["Corpus", "HeldOut", "Texts", "cache_root", "load", "prepare"]

_MEND = "delete this folder, and it is built again"


class _Broken(Exception):
    """A folder that is not a whole data set of this format and version."""


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
        return _open(folder, verify, config.damaged)
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
        raise UserError(f"{folder}: {error}; {_MEND}") from None


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
        return _open(folder, verify, config.damaged)
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
    return _open(folder, verify, config.damaged)


def _locked(folder: Path, report: Report) -> Any:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for the process that builds it", 0.0)
        return lock.acquire(poll_interval=0.2)


def _open(folder: Path, verify: bool, damaged: Literal["stop", "skip"] = "stop") -> Corpus:
    """Every size is compared now, and the sum of a training shard when it is first read."""
    try:
        open_data_set(folder, verify=verify)
        return corpus_of(*open_guarded(folder, damaged, _MEND))
    except UserError as error:
        raise _Broken(str(error).partition(";")[0]) from None


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
    return digest(
        {
            "format": [FORMAT, VERSION],
            "holdout": sorted(set(config.holdout)),
            "tokenizer": tokenizer,
            "max_bytes": config.max_bytes,
            "holdout_bytes": config.holdout_bytes,
            "files": [[f.package, f.name, f.size, f.mtime_ns] for f in listing.files],
        }
    )
