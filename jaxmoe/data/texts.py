"""Documents to tokens, and the text of stored ones: by a table where each id is a byte string."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxmoe.data.dataset import SourceWriter
from jaxmoe.data.sources import Document
from jaxmoe.data.store import Source
from jaxmoe.data.tokenizer import Tokenizer

__all__ = ["Counts", "Decoder", "add_documents", "document_texts"]

Counts = dict[str, dict[str, int]]  # by name: documents, bytes, tokens with an eot each
_BATCH_BYTES = 4_000_000  # of text encoded at a time: bounds the tokenizer's memory
_READ = 1 << 17  # tokens decoded at a time: half a megabyte of text, with its indices in the cache


class Decoder:
    """Ids to UTF-8 bytes. By a table 150 MB a second on one core; `Tokenizer.decode` gives 10.

    The table needs ids that are plain byte strings, as in every byte-level tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._eot = tokenizer, tokenizer.eot
        table = tokenizer.token_bytes()
        self._table = table is not None
        if table is not None:
            table[tokenizer.eot] = b""
            self._pool = np.frombuffer(b"".join(table), np.uint8)
            self._lengths = np.array([len(t) for t in table], np.int32)
            self._starts = (np.cumsum(self._lengths) - self._lengths).astype(np.int32)

    def text(self, ids: np.ndarray) -> bytes:
        """Of ids [tokens] without an eot."""
        return self.texts(ids, [0, len(ids)])[0]

    def texts(self, ids: np.ndarray, cuts: Sequence[int] | np.ndarray) -> list[bytes]:
        """The parts of ids [tokens] between `cuts`, ascending; an eot in one has no text."""
        if not self._table:
            pairs = zip(cuts[:-1], cuts[1:], strict=True)
            parts = (ids[a:b] for a, b in pairs)
            return [self._tokenizer.decode(p[p != self._eot]).encode() for p in parts]
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int32)
        total = int(ends[-1]) if len(ends) else 0
        shifts = self._starts[ids] - (ends - lengths)
        raw = self._pool[np.repeat(shifts, lengths) + np.arange(total, dtype=np.int32)].tobytes()
        places = np.concatenate([[0], ends])[np.asarray(cuts)].tolist()
        return [raw[a:b] for a, b in zip(places[:-1], places[1:], strict=True)]


def document_texts(
    source: Source, start: int, stop: int, decoder: Decoder
) -> Iterator[tuple[int, list[bytes]]]:
    """(first document, the texts of it and those after it) of documents start..stop, in order."""
    while start < stop:
        first, end = source.bounds(start)
        cuts = [0, end - first]
        while start + len(cuts) - 1 < stop:
            end = source.bounds(start + len(cuts) - 1)[1]
            if end - first > _READ:
                break
            cuts.append(end - first)
        yield start, decoder.texts(source.read(first, first + cuts[-1]), cuts)
        start += len(cuts) - 1


def add_documents(
    writer: SourceWriter,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    report: Callable[[float], None] = lambda done: None,
) -> tuple[Counts, Counts]:
    """Encodes and writes all of them, in order. Counts by domain, in that order, and by package."""
    domains: Counts = {}
    packages: Counts = {}
    done, total = 0, sum(len(d.data) for d in documents)
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([d.text for d in batch])
        for document, ids in zip(batch, encoded, strict=True):
            writer.add(document.package, document.name, document.data, ids)
            for counts, key in ((domains, document.domain), (packages, document.package)):
                row = counts.setdefault(key, {"documents": 0, "bytes": 0, "tokens": 0})
                row["documents"] += 1
                row["bytes"] += len(document.data)
                row["tokens"] += len(ids) + 1
            done += len(document.data)
        report(done / total)
    return domains, dict(sorted(packages.items()))


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
