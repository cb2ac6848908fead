"""Files of ours and of the `safetensors` library are the same format, and broken ones are named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from folders import BF16, assert_same, read

from jaxmoe.convert import safetensors as ours
from jaxmoe.errors import UserError

F8 = ours.DTYPES["F8_E4M3"]
SHAPES = ((7, 3), (5,), (0, 4), (2, 3, 5), (1,))


def some(dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t.{i}": (3 * rng.normal(size=s)).astype(dtype) for i, s in enumerate(SHAPES)}


def write(folder: Path, tensors: dict[str, np.ndarray], limit: int = 1 << 30) -> int:
    """By our writer, each tensor in pieces of two rows; how many files."""
    folder.mkdir(exist_ok=True)
    entries = [(name, t.dtype, t.shape) for name, t in tensors.items()]
    plans, index = ours.plan_files(entries, limit)
    for plan in plans:
        with ours.Writer(folder, plan) as writer:
            for name, _, _ in plan.entries:
                value = tensors[name]
                writer.write(name, (value[i : i + 2] for i in range(0, len(value), 2)))
    if index is not None:
        (folder / ours.INDEX).write_text(json.dumps(index))
    return len(plans)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.uint8, BF16])
def test_both_ways_with_the_library(tmp_path: Path, dtype: Any) -> None:
    tensors = some(dtype)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_same({n: t.read() for n, t in ours.tensors(tmp_path).items()}, tensors)
    write(tmp_path / "ours", tensors)
    assert_same(read(tmp_path / "ours"), tensors)
    with safetensors.safe_open(tmp_path / "ours" / ours.SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_float8_by_its_bytes(tmp_path: Path) -> None:
    """The library's numpy side writes it and does not read it."""
    value = np.arange(256, dtype=np.uint8).reshape(32, 8)
    safetensors.numpy.save_file({"x": value.view(F8)}, tmp_path / "a.safetensors")
    found = ours.tensors(tmp_path)["x"]
    assert found.dtype == F8 and found.shape == (32, 8)
    np.testing.assert_array_equal(found.read().view(np.uint8), value)
    write(tmp_path / "ours", {"x": value.view(F8)})
    ((name, about),) = safetensors.deserialize((tmp_path / "ours" / ours.SINGLE).read_bytes())
    assert (name, about["dtype"], about["shape"]) == ("x", "F8_E4M3", [32, 8])
    assert bytes(about["data"]) == value.tobytes()


def test_rows_alone(tmp_path: Path) -> None:
    tensors = some(BF16)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    found = ours.tensors(tmp_path)
    for name, value in tensors.items():
        for start, stop in ((0, len(value)), (1, len(value)), (0, 1)):
            part = found[name].read(start, min(stop, len(value))) if len(value) else value
            assert_same({name: part}, {name: value[start:stop] if len(value) else value})


def test_several_files_and_their_index(tmp_path: Path) -> None:
    """Files of at most so many bytes, but for a tensor that is larger; named as the hub does."""
    tensors = some(np.float32)
    sizes = [t.nbytes for t in tensors.values()]
    limit = 90
    assert max(sizes) > limit
    count = write(tmp_path, tensors, limit)
    assert count == 4
    index = json.loads((tmp_path / ours.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    for i in range(1, count + 1):
        name = f"model-{i:05}-of-{count:05}.safetensors"
        held = safetensors.numpy.load_file(tmp_path / name)
        assert held.keys() == {n for n, f in index["weight_map"].items() if f == name}
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    assert_same({n: t.read() for n, t in ours.tensors(tmp_path).items()}, tensors)


def test_only_what_the_index_names_is_read(tmp_path: Path) -> None:
    """The hub has copies of some models beside the indexed files."""
    write(tmp_path, some(np.float32), 90)
    safetensors.numpy.save_file({"other": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert "other" not in ours.tensors(tmp_path)


def header(entries: Any, data: bytes = b"\0" * 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**values: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **values}}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"1234", "not a safetensors file"),
    "text": (b"<!DOCTYPE html><html>an error page</html>", "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", "not a safetensors file"),
    "no json": (header(b"{broken"), "not a safetensors file"),
    "no utf-8": (header(b"\xff\xfe{}"), "not a safetensors file"),
    "a list": (header([1]), "not a safetensors file"),
    "no entry": (header({"x": 3}), "not a safetensors file"),
    "no shape": (header({"x": {"dtype": "F32", "data_offsets": [0, 8]}}), "not a safetensors file"),
    "header cut": (header(entry())[:20], "not a safetensors file"),
    "data cut": (header(entry(), b"\0" * 7), "cut off: x ends at byte"),
    "dtype": (header(entry(dtype="F6_E2M3")), "x is F6_E2M3; read are F64, F32"),
    "size": (header(entry(shape=[3])), "x has 8 bytes, which is not (3,) float32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    file = tmp_path / "model-00001-of-00002.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        ours.tensors(tmp_path)
    text = str(error.value)
    assert str(file) in text and message in text and "\n" not in text


def test_cut_off_anywhere(tmp_path: Path) -> None:
    tensors = some(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 5, 8, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.safetensors"):
            ours.tensors(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / ours.INDEX).write_text("{"), ours.INDEX),
        (lambda f: (f / ours.INDEX).write_text('{"a": 1}'), ours.INDEX),
        (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "model-00002-of-00004"),
    ],
)
def test_index_or_file_missing(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    write(tmp_path, some(np.float32), 90)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        ours.tensors(tmp_path)


def test_no_files_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no .*safetensors files"):
        ours.tensors(tmp_path)
