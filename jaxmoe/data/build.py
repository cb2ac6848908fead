"""Writes one data set into an empty folder: token streams, tokenizer, and the manifest last.

    train.bin       tokens: eot, then every document followed by eot
    train.ends.bin  int64: the index in train.bin after each document's eot
    holdout.bin     tokens, in the same form
    tokenizer.json
    manifest.json   format, counts, what was left out and why, sizes and SHA-256 of the files

The same sources and settings give the same bytes in every file.
"""

import hashlib
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.config import DataConfig
from jaxmoe.data.dataset import digest
from jaxmoe.data.holdout import Overlap, Split, Taken, overlap_row, split, take
from jaxmoe.data.sources import Document, Listing, screen
from jaxmoe.data.tokenizer import Tokenizer, train_bpe
from jaxmoe.data.tokenizer_files import load_tokenizer
from jaxmoe.errors import UserError

__all__ = ["FORMAT", "MANIFEST", "Report", "files_fingerprint", "write"]

# Raise it with any change to the files, or to which documents are chosen and how they are split.
FORMAT = 1
MANIFEST = "manifest.json"
_SHARES = "shares passages with held-out text"
_BATCH_BYTES = 4_000_000  # of text encoded at a time: bounds the tokenizer's memory

Report = Callable[[str, float], None]  # (phase, fraction of it that is done)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """One written token file."""

    tokens: int
    files: dict[str, dict[str, Any]]
    packages: dict[str, dict[str, int]]


def write(
    folder: Path, config: DataConfig, vocab_size: int, listing: Listing, report: Report
) -> None:
    """Builds everything from `listing` into the empty `folder`.

    Raises:
        UserError: the sources cannot give a training and a held-out set.
    """
    listing = screen(listing)
    parts = split(listing.files, config.holdout, listing.where)
    heldout, train = _documents(config, parts, listing.where, report)
    report("tokenizer", 0.0)
    tokenizer = _tokenizer(config, vocab_size, train.documents)
    report("tokenizer", 1.0)
    trained = _write_stream(folder, "train", train, tokenizer, report)
    held = _write_stream(folder, "holdout", heldout, tokenizer, lambda phase, done: None)
    saved = _write_file(folder / "tokenizer.json", [tokenizer.json.encode()])
    files = {**trained.files, **held.files, "tokenizer.json": saved}
    text = _text_fingerprint(heldout.documents)
    compared = overlap_row(len(train.documents), train.dropped.get(_SHARES, 0))
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "dtype": tokenizer.dtype.str,
            "fingerprint": tokenizer.fingerprint,
        },
        "files": files,
        "train": _summary(train, trained),
        "holdout": {
            "names": list(parts.packages) or sorted(d.name for d in heldout.documents),
            "fingerprint": text,
            "xz_bits_per_byte": _xz_bits_per_byte(heldout.documents),
            **_summary(heldout, held),
        },
        "overlap": {text: {files_fingerprint(files): compared}},
        "skipped": dict(listing.skipped),
        "settings": {
            "tokenizer_bytes": config.tokenizer_bytes,
            "max_bytes": config.max_bytes,
            "holdout_bytes": config.holdout_bytes,
        },
    }
    lines = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    _write_file(folder / MANIFEST, [lines.encode()])
    sync_folder(folder)


def files_fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    """16 hex digits over the SHA-256 of every file: what a run was trained on."""
    return digest({name: row["sha256"] for name, row in files.items()})


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _documents(config: DataConfig, parts: Split, where: str, report: Report) -> tuple[Taken, Taken]:
    seen: set[bytes] = set()

    def duplicate(document: Document) -> str | None:
        digest = hashlib.sha256(document.data).digest()
        if digest in seen:
            return "identical to another"
        seen.add(digest)
        return None

    report("read", 0.0)
    heldout = take(parts.heldout, config.holdout_bytes, duplicate)
    if not heldout.documents:
        smallest = min(f.size for f in parts.heldout)
        raise UserError(
            f"data.holdout_bytes={config.holdout_bytes}: no held-out document of {where} fits; "
            f"set it to {smallest} or more (the smallest has so many bytes)"
        )
    overlap = Overlap(d.data for d in heldout.documents)

    def refuse(document: Document) -> str | None:
        shares = overlap.leaks(document.data)
        return duplicate(document) or (_SHARES if shares else None)

    train = take(parts.train, config.max_bytes, refuse, lambda done: report("read", done))
    if not train.documents:
        why = ", ".join(f"{n} {reason}" for reason, n in train.dropped.items())
        raise UserError(
            f"data.max_bytes={config.max_bytes}: nothing of {where} is left to train on ({why}); "
            "give more text, or raise data.max_bytes if that is what leaves it out"
        )
    report("read", 1.0)
    return heldout, train


def named_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """One that is not learnt from this text. Raises UserError: none, or of too many ids."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: tokenizer {config.tokenizer} has "
            f"{tokenizer.vocab_size} ids; set it to that or more"
        )
    return tokenizer


def _tokenizer(config: DataConfig, vocab_size: int, documents: Sequence[Document]) -> Tokenizer:
    if config.tokenizer != "bpe":
        return named_tokenizer(config, vocab_size)
    sample: list[str] = []
    total = 0
    for document in documents:  # in hash order: the first ones are a fair sample
        total += len(document.data)
        if sample and total > config.tokenizer_bytes:
            break
        sample.append(document.text)
    return train_bpe(sample, vocab_size)


def _write_stream(
    folder: Path, name: str, taken: Taken, tokenizer: Tokenizer, report: Report
) -> _Stream:
    report("encode", 0.0)
    ends: list[int] = []
    packages: dict[str, dict[str, int]] = {}

    def parts() -> Iterator[bytes]:
        eot = np.array([tokenizer.eot], tokenizer.dtype).tobytes()
        position = 1
        done = 0
        yield eot
        for batch in _batches(taken.documents):
            encoded = tokenizer.encode_batch([d.text for d in batch])
            for document, ids in zip(batch, encoded, strict=True):
                position += len(ids) + 1
                done += len(document.data)
                ends.append(position)
                _count(packages, document, len(ids) + 1)
                yield ids.tobytes()
                yield eot
            report("encode", done / taken.bytes)

    files = {f"{name}.bin": _write_file(folder / f"{name}.bin", parts())}
    if name == "train":
        ends_bytes = np.array(ends, "<i8").tobytes()
        files[f"{name}.ends.bin"] = _write_file(folder / f"{name}.ends.bin", [ends_bytes])
    return _Stream(tokens=ends[-1], files=files, packages=dict(sorted(packages.items())))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(packages: dict[str, dict[str, int]], document: Document, tokens: int) -> None:
    row = packages.setdefault(document.package, {"documents": 0, "bytes": 0, "tokens": 0})
    row["documents"] += 1
    row["bytes"] += len(document.data)
    row["tokens"] += tokens


def _write_file(path: Path, parts: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    with open(path, "wb") as stream:
        for part in parts:
            digest.update(part)
            size += stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _summary(taken: Taken, stream: _Stream) -> dict[str, Any]:
    prose = sum(len(d.data) for d in taken.documents if d.domain == "prose")
    return {
        "documents": len(taken.documents),
        "bytes": taken.bytes,
        "tokens": stream.tokens,
        "domains": {"code": taken.bytes - prose, "prose": prose},
        "dropped": taken.dropped,
        "packages": stream.packages,
    }


def _text_fingerprint(documents: Sequence[Document]) -> str:
    """16 hex digits of the text and its borders alone: the same under every tokenizer."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.data).to_bytes(8, "little"))
        digest.update(document.data)
    return digest.hexdigest()[:16]


def _xz_bits_per_byte(documents: Sequence[Document]) -> float:
    text = b"".join(d.data for d in documents)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
