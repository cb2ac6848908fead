"""Small data sets of format 2, for the tests of held-out sets and overlap."""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxmoe.data.dataset import (
    DataSet,
    SourceWriter,
    new_manifest,
    open_data_set,
    write_manifest,
    write_tokenizer,
)
from jaxmoe.data.tokenizer import Tokenizer, bytes_tokenizer

_SYLLABLES = "ka lo mi ren tu sel or vin da pre shu ex ton ba ir que mon fal".split()

Document = tuple[str, str, str]  # package, name, text


def prose(seed: int | str, words: int = 60) -> str:
    """No window of 50 letters is in the prose of two seeds, but by a chance of 10**-40."""
    rng = random.Random(f"prose {seed}")
    spelt = ("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(words))
    return " ".join(w.capitalize() if rng.random() < 0.2 else w for w in spelt) + ".\n"


def write(
    folder: Path,
    sources: Mapping[str, Iterable[Document]],
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 1 << 17,
) -> DataSet:
    """A data set of these documents, in their order."""
    folder.mkdir()
    tokenizer = tokenizer or bytes_tokenizer()
    entries, files = {}, write_tokenizer(folder, tokenizer)
    for name, documents in sources.items():
        writer = SourceWriter(folder, name, tokenizer, shard_bytes)
        for package, title, text in documents:
            writer.add(package, title, text.encode(), tokenizer.encode_batch([text])[0])
        entries[name], more = writer.close(domain=name)
        files.update(more)
    write_manifest(folder, new_manifest(tokenizer, entries, files))
    return open_data_set(folder)


def texts_of(data: DataSet, source: str) -> list[str]:
    row = data.sources.get(source) or data.heldout[source]
    bounds = (row.bounds(n) for n in range(row.documents))
    return [data.tokenizer.decode(row.read(a, b - 1)) for a, b in bounds]
