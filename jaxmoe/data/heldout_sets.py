"""Named held-out sets of a data set: written into its folder, taken out of its sources, opened.

A set is kept as a source is (jaxmoe/data/dataset.py), under `heldout` in the manifest. Its
documents lie domain by domain, in the order of their SHA-256, so that equal text has equal bytes,
whatever the files were called. What is held out of a training source is removed from that source.
"""

import dataclasses
import fnmatch
import hashlib
import itertools
import lzma
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxmoe.data.corpus import Corpus, HeldOut, Texts
from jaxmoe.data.damage import Guard
from jaxmoe.data.dataset import (
    MEND,
    DataSet,
    Names,
    SourceWriter,
    check_name,
    open_data_set,
    write_manifest,
)
from jaxmoe.data.heldout_text import Found
from jaxmoe.data.sources import Document
from jaxmoe.data.store import StoredSource
from jaxmoe.data.texts import Decoder, add_documents, document_texts
from jaxmoe.data.tokenizer import Tokenizer
from jaxmoe.errors import UserError
from jaxmoe.outside import needed, reading

__all__ = [
    "STRICT",
    "Strict",
    "add_set",
    "corpus_of",
    "held_out_sets",
    "locked",
    "move_to_set",
    "part",
    "remove",
    "write_set",
]

Report = Callable[[str, float], None]  # (phase, fraction of it that is done)


@dataclass(frozen=True)
class Strict:
    """The strict set: this project's own tree, which no corpus of before has."""

    commit: str
    text_fingerprint: str


STRICT = Strict("7358b3771fcc2a0c3435cc856a9813983142d7b5", "6e97a5d2623d04a2")


def locked(folder: Path) -> AbstractContextManager[Any]:
    """Held by whoever changes a data set: another one is told, and waits for nothing.

    Raises:
        UserError: another process changes it.
    """
    try:
        return filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process changes it; wait for it to end") from None
    except OSError as error:
        raise UserError(f"{folder}: {error}; held-out sets are written into it") from None


def add_set(
    folder: Path,
    name: str,
    found: Found,
    report: Report,
    *,
    replace: bool = False,
    expected: str | None = None,
) -> Mapping[str, Any]:
    """Writes a set of `found` into the data set. Returns its entry of the manifest.

    Raises:
        UserError: a bad name, one that is taken and not to be replaced, or a text fingerprint that
            is not the `expected` one.
    """
    with locked(folder):
        data = open_data_set(folder)
        _check_free(data, name, replace)
        entry, files = _write_set(data, name, found, report)
        if expected is not None and entry["text_fingerprint"] != expected:
            for file in files:
                (data.folder / file).unlink()
            raise UserError(f"{name}: its text is {entry['text_fingerprint']}, not {expected}")
        _commit(data, heldout={name: entry}, files=files)
    return entry


def move_to_set(
    folder: Path,
    name: str,
    sources: Sequence[str],
    report: Report,
    *,
    packages: Sequence[str] = (),
    documents: Sequence[str] = (),
    share: float = 0.0,
    replace: bool = False,
) -> Mapping[str, Any]:
    """Moves documents of training sources to a set; the sources are written again without them.

    Args:
        sources: names, * and ? standing for any characters.
        packages: whole ones: a source that has them too and is not named is an error.
        documents: names, likewise.
        share: of the documents, by the hash of package and name: the same in any build, and in
            every source that has a part of the same file.

    Raises:
        UserError: no such source, package or document, a package that stays elsewhere, or nothing
            would be left to train on.
    """
    with locked(folder):
        data = open_data_set(folder)
        _check_free(data, name, replace)
        chosen = _chosen(data, _sources(data, sources), packages, documents, share)
        _check_gone(data, chosen, packages)
        prints = {s: data.manifest["sources"][s]["fingerprint"] for s in chosen}
        choice = {"packages": list(packages), "documents": list(documents), "share": share}
        taken = Found(
            documents=tuple(d for s, n in chosen.items() for d in _documents(data, s, n)),
            skipped={},
            origin={"how": "sources", "sources": prints, **choice},
        )
        entry, files = _write_set(data, name, taken, report)
        rest = {}
        for source, numbers in chosen.items():
            rest[source], more = _without(data, source, set(numbers), report)
            files.update(more)
        _commit(data, heldout={name: entry}, sources=rest, files=files)
    return entry


def remove(
    data: DataSet,
    drop: Mapping[str, set[int]],
    overlap: Mapping[str, Mapping[str, Any]],
    report: Report,
) -> DataSet:
    """Records what was compared, and writes sources again without the documents in `drop`, by name.

    The caller holds the lock.

    Args:
        overlap: by held-out fingerprint, by source, the manifest's row of the source as it is then.

    Raises:
        UserError: nothing would be left of a source.
    """
    sources, files = {}, {}
    for name, documents in drop.items():
        if len(documents) == data.sources[name].documents:
            raise UserError(f"source {name!r}: every document of it is held-out text; leave it out")
        sources[name], more = _without(data, name, documents, report)
        files.update(more)
    prints = {n: e["fingerprint"] for n, e in {**data.manifest["sources"], **sources}.items()}
    found = {
        print_: {prints[name]: row for name, row in rows.items()}
        for print_, rows in overlap.items()
    }
    _commit(data, sources=sources, files=files, overlap=found)
    return open_data_set(data.folder)


def held_out_sets(data: DataSet) -> tuple[HeldOut, ...]:
    """All of them, by name, as training evaluates them.

    Raises:
        UserError: there is none.
    """
    if not data.heldout:
        raise UserError(
            f"{data.folder} has no held-out set; add one with python -m jaxmoe.data holdout"
        )
    return tuple(_opened(data, name) for name in sorted(data.heldout))


def corpus_of(data: DataSet, guard: Guard, *, remote: bool = False) -> Corpus:
    """What a run reads of it.

    Raises:
        UserError: there is no held-out set.
    """
    first, *rest = held_out_sets(data)
    return Corpus(
        folder=data.folder,
        manifest=data.manifest,
        tokenizer=data.tokenizer,
        heldout=first,
        others=tuple(rest),
        fingerprint=data.fingerprint,
        guard=guard,
        remote=remote,
        sources=data.sources,
        names=data.names,
    )


def part(whole: HeldOut, tokens: int) -> HeldOut:
    """About so many tokens of a set at the most: whole documents, of each domain its share.

    It says so in its fingerprint, by the documents of each domain: a part is another set.
    """
    if tokens >= len(whole.tokens):
        return whole
    share = tokens / len(whole.tokens)
    parts = {}
    for domain, texts in whole.domains.items():
        count = max(1, int(np.searchsorted(texts.ends, share * texts.ends[-1], "right")))
        parts[domain] = Texts(
            tokens=texts.tokens[: texts.ends[count - 1]],
            ends=texts.ends[:count],
            sizes=texts.sizes[:count],
        )
    counts = "+".join(str(len(p.ends)) for p in parts.values())
    return _of_domains(whole, f"{whole.fingerprint}/{counts}", parts)


def write_set(
    writer: SourceWriter,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    report: Callable[[float], None] = lambda done: None,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A set of documents that lie domain by domain: (its entry, with `more` in it; its files)."""
    domains, _ = add_documents(writer, documents, tokenizer, report)
    compressor = lzma.LZMACompressor(preset=9)
    packed = sum(len(compressor.compress(d.data)) for d in documents) + len(compressor.flush())
    return writer.close(
        domain=next(iter(domains)) if len(domains) == 1 else "mixed",
        domains=domains,
        xz_bits_per_byte=8 * packed / sum(len(d.data) for d in documents),
        **more,
    )


def _opened(data: DataSet, name: str) -> HeldOut:
    entry, source, names = (
        data.manifest["heldout"][name],
        data.heldout[name],
        data.heldout_names[name],
    )
    with reading(f"{data.folder}: held-out set {name!r}", MEND):
        return _of_entry(data, name, entry, source, names)


def _of_entry(
    data: DataSet, name: str, entry: Mapping[str, Any], source: StoredSource, names: Names
) -> HeldOut:
    needed(entry, {"domains": dict, "xz_bits_per_byte": (int, float)}, "its entry")
    domains = {}
    first = 0
    for domain, about in entry["domains"].items():
        numbers = range(first, first + about["documents"])
        bounds = [source.bounds(n) for n in numbers]
        begin = bounds[0][0] - 1  # at the eot before: what the first token is predicted from
        domains[domain] = Texts(
            tokens=source.read(begin, bounds[-1][1]).astype(data.tokenizer.dtype),
            ends=np.array([end - begin for _, end in bounds], np.int64),
            sizes=np.array([names[n].bytes for n in numbers], np.int64),
        )
        first += about["documents"]
    return HeldOut(
        name=name,
        tokens=source.read(0, source.tokens).astype(data.tokenizer.dtype),
        bytes=entry["bytes"],
        fingerprint=entry["text_fingerprint"],
        xz_bits_per_byte=entry["xz_bits_per_byte"],
        domains=domains,
    )


def _of_domains(whole: HeldOut, fingerprint: str, parts: Mapping[str, Texts]) -> HeldOut:
    return dataclasses.replace(
        whole,
        tokens=np.concatenate([whole.tokens[:1], *(p.tokens[1:] for p in parts.values())]),
        bytes=int(sum(p.sizes.sum() for p in parts.values())),
        fingerprint=fingerprint,
        domains=parts,
    )


def _write_set(
    data: DataSet, name: str, found: Found, report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    keyed = {hashlib.sha256(d.data).digest(): d for d in found.documents}
    ordered = sorted(keyed.items(), key=lambda pair: (pair[1].domain, pair[0]))
    documents = [d for _, d in ordered]
    writer = SourceWriter(data.folder, _stem(data, f"heldout.{name}"), data.tokenizer)
    skipped = dict(found.skipped)
    if len(keyed) < len(found.documents):
        skipped["identical to another"] = len(found.documents) - len(keyed)
    told = partial(report, f"write {name}")
    return write_set(writer, documents, data.tokenizer, told, origin=found.origin, skipped=skipped)


def _sources(data: DataSet, patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(data.sources, pattern):
            known = ", ".join(data.sources)
            raise UserError(f"{data.folder} has no source {pattern!r}; it has {known}")
    return [s for s in data.sources if any(fnmatch.fnmatchcase(s, p) for p in patterns)]


def _check_free(data: DataSet, name: str, replace: bool) -> None:
    check_name(name)
    if name in data.heldout and not replace:
        raise UserError(f"{data.folder} has a held-out set {name!r}; --replace writes it again")


def _chosen(
    data: DataSet,
    sources: Sequence[str],
    packages: Sequence[str],
    patterns: Sequence[str],
    share: float,
) -> dict[str, list[int]]:
    """By source, its documents to hold out."""
    chosen: dict[str, list[int]] = {}
    missing = set(packages) | set(patterns)
    for source in sources:
        names = data.names[source]
        for number in range(len(names)):
            package, name = names[number].package, names[number].name
            hits = {p for p in packages if p == package}
            hits |= {p for p in patterns if fnmatch.fnmatchcase(name, p)}
            missing -= hits
            if hits or _drawn(package, name) < share:
                chosen.setdefault(source, []).append(number)
        if len(chosen.get(source, ())) == len(names):
            raise UserError(f"source {source!r}: nothing would be left to train on; hold out less")
    where = ", ".join(sources)
    if missing:
        raise UserError(f"{where}: there is no {', '.join(sorted(missing))}; see its names.jsonl")
    if not chosen:
        raise UserError(f"{where}: no document is chosen; raise --share, or name some")
    return chosen


def _check_gone(data: DataSet, chosen: Mapping[str, Any], packages: Sequence[str]) -> None:
    """Comments of a package in one source give away its code in another."""
    for source in sorted(set(data.names) - set(chosen)):
        names = data.names[source]
        left = {names[n].package for n in range(len(names))} & set(packages)
        if left:
            raise UserError(
                f"package {min(left)!r} is in source {source!r} too: add --source {source}"
            )


def _drawn(package: str, name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.sha256(f"{package}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _documents(data: DataSet, source: str, chosen: Iterable[int]) -> Iterable[Document]:
    decoder = Decoder(data.tokenizer)
    row = data.sources[source]
    for number in chosen:
        begin, end = row.bounds(number)
        about = data.names[source][number]
        text = decoder.text(row.read(begin, end - 1))
        yield Document(package=about.package, name=about.name, data=text, domain=row.domain)


def _without(
    data: DataSet, source: str, drop: set[int], report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(entry, files) of the source written again, under other names: the old one stays whole."""
    row, names, before = data.sources[source], data.names[source], data.manifest["sources"][source]
    decoder = Decoder(data.tokenizer)
    writer = SourceWriter(data.folder, _stem(data, source), data.tokenizer)
    for first, texts in document_texts(row, 0, row.documents, decoder):
        for number, text in enumerate(texts, first):
            if number not in drop:
                begin, end = row.bounds(number)
                about, sha256 = names[number], hashlib.sha256(text).digest()
                ids = row.read(begin, end - 1)
                writer.add_tokens(about.package, about.name, about.bytes, sha256, ids)
        report(f"rewrite {source}", (first + len(texts)) / row.documents)
    kept = {k: v for k, v in before.items() if k not in _WRITTEN}
    kept["removed"] = before.get("removed", 0) + len(drop)
    return writer.close(**kept)


# The keys of a source's entry that its writer makes.
_WRITTEN = frozenset(
    "tokens documents bytes shards ends names text_fingerprint fingerprint".split()
)


def _stem(data: DataSet, stem: str) -> str:
    """For new files beside those that the manifest names."""
    stems = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count()))
    return next(s for s in stems if f"{s}.ends.bin" not in data.manifest["files"])


def _commit(
    data: DataSet,
    *,
    files: Mapping[str, Any],
    heldout: Mapping[str, Any] | None = None,
    sources: Mapping[str, Any] | None = None,
    overlap: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The new manifest at once; then the files that it no longer names go."""
    before = data.manifest
    after = {
        **before,
        "heldout": {**before["heldout"], **(heldout or {})},
        "sources": {**before["sources"], **(sources or {})},
        "overlap": _overlap_after(before, sources or {}, overlap or {}),
    }
    entries = [*after["heldout"].values(), *after["sources"].values()]
    named = {f for e in entries for f in (*e["shards"], e["ends"], e["names"])}
    old = {f for f in before["files"] if f not in named and f in _files_of(before)}
    after["files"] = {k: v for k, v in {**before["files"], **files}.items() if k not in old}
    write_manifest(data.folder, after)
    for file in old:
        (data.folder / file).unlink(missing_ok=True)


def _files_of(manifest: Mapping[str, Any]) -> set[str]:
    entries = [*manifest["heldout"].values(), *manifest["sources"].values()]
    return {f for e in entries for f in (*e["shards"], e["ends"], e["names"])}


def _overlap_after(
    before: Mapping[str, Any],
    sources: Mapping[str, Any],
    overlap: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """What was checked before, and holds of a source without some documents if it was clean."""
    rows: dict[str, dict[str, Any]] = {k: dict(v) for k, v in before["overlap"].items()}
    for name, entry in sources.items():
        old = before["sources"][name]["fingerprint"]
        for checked in rows.values():
            row = checked.pop(old, None)
            if row is not None and row["leaking"] == 0:
                checked[entry["fingerprint"]] = {**row, "part_of": old}
    for print_, found in overlap.items():
        rows.setdefault(print_, {}).update(found)
    return rows
