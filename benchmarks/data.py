"""`python benchmarks/data.py`: tokens a second of the training stream on one core, memory-mapped.

Two sources of generated documents (log-normal lengths, median 665 tokens), uint16 in files of 130
MB each, mixed 2 : 1. Timed is what a process of a run does for its batch: the mix, the order,
packing, fill in the middle, documents, and the copy into int32 rows of length + 1. The processor's
time counts, so that other work on the machine does not. best_fit arranges each window once: it is
measured over as many sequences as a block has, arranging included.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from jaxmoe.data.loader import Stream
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.store import Row, StoredSource

SPECIALS = {"eot": 0, "fim_prefix": 1, "fim_middle": 2, "fim_suffix": 3}
TOKENS = 65_536  # of a batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: source(Path(folder), name, i) for i, name in enumerate(("code", "text"))}
        found = list(rows(sources, args.seconds))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("| stream | length 1,024 | length 8,192 |\n|---|---|---|")
    for name in dict.fromkeys(row["stream"] for row in found):
        rates = [f"{row['mtok_s']:.0f}" for row in found if row["stream"] == name]
        print(f"| {name} | {' | '.join(rates)} |")
    return 0


def source(folder: Path, name: str, seed: int) -> StoredSource:
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(6.5, 1.0, 60_000).astype(np.int64) + 1
    ends = 1 + np.cumsum(lengths + 1)
    row = rng.integers(5, 32_000, ends[-1], dtype=np.uint16)
    row[np.append(0, ends - 1)] = 0
    row.tofile(folder / f"{name}.bin")
    ends.astype("<i8").tofile(folder / f"{name}.ends.bin")
    shard = np.memmap(folder / f"{name}.bin", "<u2", mode="r")
    return StoredSource(name, [shard], np.memmap(folder / f"{name}.ends.bin", "<i8", mode="r"))


def rows(sources: dict[str, StoredSource], seconds: float) -> Iterator[dict[str, Any]]:
    kinds: list[tuple[str, dict[str, Any], float]] = [
        ("a mix, split", {}, 0.0),
        ("with documents", {"document_mask": True}, 0.0),
        ("with half of the code in the middle filled", {"document_mask": True}, 0.5),
        ("a mix, best fit, with documents", {"document_mask": True, "packing": "best_fit"}, 0.0),
        ("best fit and fill in the middle", {"document_mask": True, "packing": "best_fit"}, 0.5),
    ]
    for length in (1024, 8192):
        plain = memmap(sources["code"], length, seconds)
        yield {"stream": "raw memory map, rows in order", "length": length, "mtok_s": plain}
        grain = plain_stream(sources["code"], length, seconds)
        yield {
            "stream": "one source, the default stream (grain)",
            "length": length,
            "mtok_s": grain,
        }
        for name, data, rate in kinds:
            config = config_of(length, rate, **data)
            yield {"stream": name, "length": length, "mtok_s": mixed(config, sources, seconds)}


def config_of(length: int, fim: float, **data: Any) -> Config:
    mix = (SourceConfig(name="code", weight=2.0, fim_rate=fim), SourceConfig(name="text"))
    return Config(
        model=ModelConfig(loss_chunk=1),
        data=DataConfig(sources=mix, **data),
        train=TrainConfig(steps=10**6, batch_size=TOKENS // length, seq_len=length),
    )


def mixed(config: Config, sources: dict[str, StoredSource], seconds: float) -> float:
    stream, batch = Mixture(config, sources, SPECIALS), config.train.batch_size
    whole = 65_536 // batch if config.data.packing == "best_fit" else 0

    def draw(step: int) -> None:
        stream.rows(step, 0, batch)
        stream.first_times(step, 0, batch)

    return rate(draw, seconds, at_least=whole)


def plain_stream(one: StoredSource, length: int, seconds: float) -> float:
    stream, batch = Stream(Row(one), length, 0), TOKENS // length
    return rate(lambda step: stream.rows(step * batch, 0, batch), seconds)


def memmap(one: StoredSource, length: int, seconds: float) -> float:
    batch = TOKENS // length
    n = (one.tokens - 1) // length - batch

    def read(step: int) -> np.ndarray:
        first = step * batch % n
        return np.stack(
            [one.read((first + i) * length, (first + i + 1) * length + 1) for i in range(batch)]
        )

    return rate(read, seconds)


def rate(read: Any, seconds: float, at_least: int = 0) -> float:
    """Mtok/s of processor time, over so many seconds or batches, whichever is more."""
    read(0)
    begin, step = time.process_time(), 0
    while time.process_time() - begin < seconds or step < at_least:
        read(step)
        step += 1
    return step * TOKENS / (time.process_time() - begin) / 1e6


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
