"""The safetensors format, a tensor at a time.

The `safetensors` library's numpy side has no float8, maps whole files (which counts as resident
memory) and writes a file only from tensors that are all in memory; the format is a length, a JSON
header and the bytes. The library reads what this writes, and the other way round, in
tests/convert/test_safetensors.py.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.outside import loads, plain_name

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype("u1"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """All of it, or rows of the first dim."""
        shape = self.shape if stop is None else (stop - start, *self.shape[1:])
        offset = self.offset + start * self.dtype.itemsize * math.prod(self.shape[1:])
        try:
            flat = np.fromfile(self.file, self.dtype, math.prod(shape), offset=offset)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}") from error
        return flat.reshape(shape)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors files, by name.

    Raises:
        UserError: no files, a file that the index names is missing, or one that is cut off.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors files: {error}") from error
        for file in files:
            if not (isinstance(file, str) and plain_name(file)):
                raise UserError(f"{index}: file {file!r} is not in the folder itself")
    else:
        files = sorted(f.name for f in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors files; other formats are not read")
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(_header(folder / file))
    return found


def _header(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = loads(stream.read(length))
        entries = [
            (name, entry["dtype"], _naturals(entry["shape"]), *_naturals(entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        if wrong := next((e for e in entries if len(e) != 5 or not isinstance(e[1], str)), None):
            raise ValueError(f"{wrong[0]}: it needs dtype, shape and two data_offsets")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    for name, kind, shape, begin, end in entries:
        if kind not in DTYPES:
            raise UserError(f"{file}: {name} is {kind}; read are {', '.join(DTYPES)}")
        dtype = DTYPES[kind]
        if 8 + length + end > size:
            raise UserError(f"{file}: cut off: {name} ends at byte {8 + length + end} of {size}")
        if end - begin != dtype.itemsize * math.prod(shape):  # Python's numbers: no overflow
            raise UserError(f"{file}: {name} has {end - begin} bytes, which is not {shape} {dtype}")
        yield name, Tensor(file, dtype, shape, 8 + length + begin)


def _naturals(values: Any) -> tuple[int, ...]:
    """Raises ValueError unless all are whole numbers from 0."""
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{values!r:.80} is no list of whole numbers")
    return tuple(values)


@dataclass(frozen=True)
class Plan:
    """Names, dtypes and shapes of a file, in the order they will be written."""

    file: str
    entries: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]

    @property
    def header(self) -> bytes:
        at, header = 0, {"__metadata__": {"format": "pt"}}
        for name, dtype, shape in self.entries:
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            entry: Any = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
            header[name] = entry
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)  # the data begins at a multiple of 8


class Writer:
    """Writes the tensors of a plan, in its order."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan, self._left = plan, list(plan.entries)
        self._path = folder / plan.file

    def __enter__(self) -> "Writer":
        self._file = open(self._path, "wb")
        header = self._plan.header
        self._file.write(struct.pack("<Q", len(header)) + header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._left, self._left[:1]

    def write(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """`pieces`: the tensor, cut along its first dim."""
        wanted, dtype, shape = self._left.pop(0)
        rows = 0
        for piece in pieces:
            assert (name, piece.dtype) == (wanted, dtype) and piece.shape[1:] == shape[1:], wanted
            self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            rows += len(piece)
        assert rows == shape[0], (name, rows)


def plan_files(
    entries: list[tuple[str, np.dtype, tuple[int, ...]]], limit: int
) -> tuple[list[Plan], Mapping[str, Any] | None]:
    """Files of at most `limit` bytes (a larger tensor has one of its own), named as Hugging Face
    does; and the index, which a single file does not need."""
    groups: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
    held = total = 0
    for entry in entries:
        size = entry[1].itemsize * int(np.prod(entry[2], dtype=np.int64))
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held, total = held + size, total + size
    if len(groups) == 1:
        return [Plan(SINGLE, tuple(groups[0]))], None
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    plans = [Plan(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    where = {entry[0]: plan.file for plan in plans for entry in plan.entries}
    return plans, {"metadata": {"total_size": total}, "weight_map": where}
