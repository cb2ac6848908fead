"""Prepares a folder of text, or this Python's own, as a data set in an empty folder.

One source, `train`, and one held-out set, `holdout`; the files are those of dataset.py. The
tokenizer is learnt from the training text if it is `bpe`. Documents that repeat held-out text are
left out, and the manifest says what was compared. The same sources and settings give the same bytes
in every file.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxmoe.config import DataConfig
from jaxmoe.data.corpus import TRAIN
from jaxmoe.data.dataset import SourceWriter, new_manifest, write_manifest, write_tokenizer
from jaxmoe.data.heldout_sets import write_set
from jaxmoe.data.holdout import Overlap, Split, Taken, overlap_row, split, take
from jaxmoe.data.sources import Document, Listing, screen
from jaxmoe.data.texts import add_documents
from jaxmoe.data.tokenizer import Tokenizer, train_bpe
from jaxmoe.data.tokenizer_files import load_tokenizer
from jaxmoe.errors import UserError

__all__ = ["HELD_OUT", "VERSION", "Report", "named_tokenizer", "write"]

# Raise it with any change to the files, or to which documents are chosen and how they are split.
VERSION = 2
HELD_OUT = "holdout"
_SHARES = "shares passages with held-out text"

Report = Callable[[str, float], None]  # (phase, fraction of it that is done)


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
    trained, files = _write_train(folder, train, tokenizer, partial(report, "encode"))
    held, more = _write_held_out(folder, heldout, parts, tokenizer)
    compared = overlap_row(trained["documents"], train.dropped.get(_SHARES, 0))
    settings = {
        "plain": True,  # read in the order of loader.py, unless the config asks for a mix
        "tokenizer_bytes": config.tokenizer_bytes,
        "max_bytes": config.max_bytes,
        "holdout_bytes": config.holdout_bytes,
    }
    manifest = new_manifest(
        tokenizer,
        {TRAIN: trained},
        {**files, **more, **write_tokenizer(folder, tokenizer)},
        heldout={HELD_OUT: held},
        overlap={held["text_fingerprint"]: {trained["fingerprint"]: compared}},
        skipped=dict(listing.skipped),
        settings=settings,
    )
    write_manifest(folder, manifest)


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


def _write_train(
    folder: Path, taken: Taken, tokenizer: Tokenizer, report: Callable[[float], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    report(0.0)
    writer = SourceWriter(folder, TRAIN, tokenizer)
    domains, packages = add_documents(writer, taken.documents, tokenizer, report)
    return writer.close(
        domain=next(iter(domains)) if len(domains) == 1 else "mixed",
        domains=domains,
        packages=packages,
        dropped=taken.dropped,
    )


def _write_held_out(
    folder: Path, taken: Taken, parts: Split, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    documents = sorted(taken.documents, key=lambda d: d.domain)  # else in their order
    packages = Counter(d.package for d in documents)
    return write_set(
        SourceWriter(folder, f"heldout.{HELD_OUT}", tokenizer),
        documents,
        tokenizer,
        origin={
            "how": "prepared",
            "names": list(parts.packages) or sorted(d.name for d in documents),
            "packages": dict(sorted(packages.items())),
        },
        skipped=taken.dropped,
    )
