"""python benchmarks/overlap.py: how fast held-out text is looked for, in MB a second of one core.

A data set of this Python installation in a temporary folder; flax and optax are held out. Text is
decoded from the stored tokens, as `python -m jaxmoe.data overlap` does. Processor time: other
programs disturb the caches all the same.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe.data import sources
from jaxmoe.data.dataset import (
    DataSet,
    SourceWriter,
    new_manifest,
    open_data_set,
    write_manifest,
    write_tokenizer,
)
from jaxmoe.data.heldout_sets import move_to_set
from jaxmoe.data.overlap import scan
from jaxmoe.data.texts import Decoder, document_texts
from jaxmoe.data.tokenizer import train_bpe
from jaxmoe.data.windows import build_index, hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = build(Path(folder), args.vocab_size)
        rows = [measure(data, method) for method in ("chars50", "ngram13")]
    print(json.dumps(rows, indent=1))


def build(folder: Path, vocab_size: int) -> DataSet:
    """One source, code; its documents in the order of their names."""
    listing = sources.screen(sources.installed())
    found = [d for f in listing.files if f.kind == "python" for d in read(f)]
    tokenizer = train_bpe([d.text for d in found[::20]], vocab_size)
    writer = SourceWriter(folder, "code", tokenizer)
    for start in range(0, len(found), 500):
        part = found[start : start + 500]
        for document, ids in zip(part, tokenizer.encode_batch([d.text for d in part]), strict=True):
            writer.add(document.package, document.name, document.data, ids)
    entry, files = writer.close(domain="code")
    files.update(write_tokenizer(folder, tokenizer))
    write_manifest(folder, new_manifest(tokenizer, {"code": entry}, files))
    report = lambda phase, done: None
    move_to_set(folder, "flax", ["code"], report, packages=["flax", "optax"])
    return open_data_set(folder)


def read(file: sources.File) -> list[sources.Document]:
    try:
        return sources.read(file)
    except sources.Unreadable:
        return []


def measure(data: DataSet, method: Any) -> dict[str, Any]:
    hashes("\u00e9".encode(), method)  # the table of characters, once a process
    index = timed(lambda: index_of(data, method))
    rows: dict[str, Any] = {}
    whole = timed(lambda: rows.update(scan(data, ["flax"], ["code"], method=method)["flax"]))
    size = data.manifest["sources"]["code"]["bytes"]
    return {
        "method": method,
        "bytes": size,
        "held-out windows": rows["code"]["heldout_windows"],
        "seconds": round(whole, 2),
        "of them for the index": round(index, 2),
        "MB/s without the index": round(size / (whole - index) / 1e6, 1),
        "leaking": rows["code"]["leaking"],
    }


def timed(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def index_of(data: DataSet, method: Any) -> None:
    held = data.heldout["flax"]
    texts = document_texts(held, 0, held.documents, Decoder(data.tokenizer))
    build_index([hashes(text, method) for _, part in texts for text in part])


if __name__ == "__main__":
    main()
