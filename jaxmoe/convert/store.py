"""Writes a folder of parameters (run/params.py), slice by slice.

The arrays are laid out as orbax does without OCDBT, with its metadata beside them, so that orbax
reads them too; they are written by tensorstore itself, because orbax wants whole arrays, and one
of ours holds a matrix of all layers and experts.
"""

import json
import math
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from jaxmoe import tree
from jaxmoe.run.params import ARRAYS, CONFIG
from jaxmoe.spec import BATCH_AXES, Spec, is_spec

CHUNK = 1 << 24  # values, at most: 64 MB in float32
IN_FLIGHT = 1 << 27  # bytes: each file is synced to disk, and one at a time would wait for each
ROWS = 256  # of a matrix that is transposed, moved at one time
# Of orbax's key_type: a position in a sequence, and a key of a mapping.
SEQUENCE, MAPPING = 1, 2


class Store:
    """Arrays of a tree of Specs, being written. `dtypes` by leaf name; a folder must not exist."""

    def __init__(self, folder: Path, specs: Any, dtypes: dict[str, np.dtype]) -> None:
        self._folder = folder
        self._writing: deque[tuple[int, Any]] = deque()
        self._bytes = 0
        (folder / ARRAYS).mkdir(parents=True)
        leaves = dict(tree.named_leaves(specs, is_leaf=is_spec))
        self._arrays = {name: self._create(name, s, dtypes[name]) for name, s in leaves.items()}
        _write_metadata(folder / ARRAYS, list(leaves))

    def _create(self, name: str, spec: Spec, dtype: np.dtype) -> Any:
        path = (self._folder / ARRAYS / name.replace("/", ".")).absolute()  # as URLs want it
        return tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": f"file://{path}/",
                "metadata": {
                    "shape": list(spec.shape),
                    "chunks": _chunks(spec),
                    "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                    "compressor": None,  # weights hardly shrink
                },
            },
            create=True,
            open=True,
        ).result()

    def write(self, name: str, index: tuple[Any, ...], value: np.ndarray, first: int = 0) -> None:
        """Rows `first` and on of leaf[index]; returns when few bytes are left on their way."""
        array = self._arrays[name]
        rows = max(1, CHUNK // max(1, value[:1].size))
        for start in range(0, len(value), rows):
            view = value[start : start + rows]
            part = np.empty(view.shape, array.dtype.numpy_dtype)
            copy_to(part, view)
            at = slice(first + start, first + start + len(part))
            # The copy is ours alone, so tensorstore need not make another.
            done = array[index][at].write(part, can_reference_source_data_indefinitely=True).commit
            done.force()
            self._writing.append((part.nbytes, done))
            self._bytes += part.nbytes
            self._wait(IN_FLIGHT)

    def read(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
        self._wait(0)
        return self._arrays[name][index].read().result()

    def _wait(self, limit: int) -> None:
        while self._bytes > limit:
            size, done = self._writing.popleft()
            done.result()
            self._bytes -= size

    def abandon(self) -> None:
        """Waits for what is on its way: else it is written into a folder that is being removed."""
        for _, done in self._writing:
            with suppress(Exception):
                done.result()

    def finish(self, about: dict[str, Any]) -> None:
        self._wait(0)
        (self._folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def copy_to(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, where one of the two is transposed.

    Rows of 4096 bytes all fall into one set of the cache, and numpy then copies 200 MB/s: a few
    rows at a time are moved to where their lengths are odd, from which it copies over 3 GB/s.
    """
    order = sorted(range(values.ndim), key=lambda i: -values.strides[i])
    source, target = values.transpose(order), out.transpose(order)
    if values.ndim < 2 or target.strides[-1] == min(target.strides):
        out[...] = values
        return
    width = source.shape[-1]
    rows = max(1, ROWS // math.prod(source.shape[1:-1]))
    for start in range(0, len(source), rows):
        part = source[start : start + rows]
        padded = np.empty((*part.shape[:-1], width + 32), out.dtype)[..., :width]
        padded[...] = part
        target[start : start + rows] = padded


def _chunks(spec: Spec) -> list[int]:
    """A layer and an expert each by themselves; large matrices by rows."""
    chunks = [1 if a in BATCH_AXES else n for a, n in zip(spec.axes, spec.shape, strict=True)]
    for dim, axis in enumerate(spec.axes):
        if axis not in BATCH_AXES:
            chunks[dim] = max(1, min(chunks[dim], CHUNK // math.prod(chunks[dim + 1 :])))
    return chunks


def _write_metadata(folder: Path, names: list[str]) -> None:
    """What orbax's PyTreeCheckpointer looks for (version 0.12)."""

    def entry(name: str) -> dict[str, Any]:
        keys = [
            {"key": key, "key_type": SEQUENCE if key.isdigit() else MAPPING}
            for key in name.split("/")
        ]
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        return {"key_metadata": keys, "value_metadata": value}

    metadata = {
        "tree_metadata": {str(tuple(name.split("/"))): entry(name) for name in names},
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(metadata))
