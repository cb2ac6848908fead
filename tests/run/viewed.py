"""What TensorBoard and Weights & Biases have of a run, read back from their files."""

import importlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LOSS = "train/nll"
HEADER, BLOCK = 7, 32 * 1024  # bytes, of a .wandb file and of its records; LevelDB's log format


@dataclass(frozen=True)
class Board:
    """By tag: (step, value), in the order that TensorBoard shows them."""

    scalars: dict[str, list[tuple[int, float]]]
    histograms: dict[str, list[tuple[int, Any]]]
    words: dict[str, list[tuple[int, str]]]
    times: dict[int, float]  # of the metrics of a step


def board(folder: Path) -> Board:
    """As TensorBoard itself reads the event files of a folder."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    read = EventAccumulator(str(folder), size_guidance=everything)
    read.Reload()
    tags: Any = read.Tags()
    return Board(
        scalars={t: [(e.step, e.value) for e in read.Scalars(t)] for t in tags["scalars"]},
        histograms={
            t: [(e.step, e.histogram_value) for e in read.Histograms(t)] for t in tags["histograms"]
        },
        words={
            t.removesuffix("/text_summary"): [
                (e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(t)
            ]
            for t in tags["tensors"]
        },
        times={e.step: e.wall_time for t in tags["scalars"] if t == LOSS for e in read.Scalars(t)},
    )


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The history of an offline run, a row a step; `_step` is its own number."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    rows = []
    (file,) = folder.glob("*.wandb")
    for data in _records(file.read_bytes()):
        record = proto.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append({**row, "_step": record.history.step.num})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """Each has a header (checksum, length, kind) in every block that it is in: kind 1 is whole, 2
    its first part, 3 a middle one, 4 the last."""
    at, parts = HEADER, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
