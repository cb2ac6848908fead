"""Hugging Face folders and folders of parameters that are cut, edited or made to do harm."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
from hostile import asked, bent, examples, of_json, raw, refused, snapshot
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.convert.__main__ import main
from jaxmoe.convert.safetensors import tensors
from jaxmoe.data.tokenizer_files import load_tokenizer
from jaxmoe.data.windows import Index
from jaxmoe.run import meta, record, seal
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.run.params import open_params

TREE = st.one_of(raw(), of_json(), of_json(), of_json())


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of four families, and one that from-hf made."""
    folder = tmp_path_factory.mktemp("there")
    for name in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"):
        hf = folders.SMALL[name]
        folders.write(folder / name, hf, folders.draw(hf))
    (folder / "to").mkdir()
    assert asked(main, "from-hf", str(folder / "mixtral"), "--to", str(folder / "ours"))[0] == 0
    return folder


def converted(source: Path) -> int:
    """The exit code; the target is whole, or is not there at all, and nothing else is changed."""
    way = "from-hf" if (source / "model.safetensors").exists() else "to-hf"
    place = source.parent / "to"
    before = {k: v for k, v in snapshot(source.parent).items() if k != str(place)}
    code, _, _ = asked(main, way, str(source), "--to", str(place / "x"), "--json", codes=(0,))
    assert [f.name for f in place.iterdir()] == (["x"] if code == 0 else [])
    shutil.rmtree(place / "x", ignore_errors=True)
    after = {k: v for k, v in snapshot(source.parent).items() if k != str(place)}
    assert after == before
    return code


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"])
@given(change=TREE)
@examples(30)
def test_any_config_of_a_family_is_converted_or_named(
    there: Path, family: str, change: Any
) -> None:
    with bent(there / family / "config.json", change):
        converted(there / family)


def in_header(change: Any) -> Callable[[bytes], bytes | None]:
    """Of a safetensors file, its JSON changed."""

    def bend(data: bytes) -> bytes | None:
        (length,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + length])
        return header and struct.pack("<Q", len(header)) + header + data[8 + length :]

    return bend


@given(change=st.one_of(raw(), of_json().map(in_header), of_json().map(in_header)))
@examples(60)
def test_any_safetensors_file_is_converted_or_named(there: Path, change: Any) -> None:
    with bent(there / "mixtral" / "model.safetensors", change):
        if (there / "mixtral" / "model.safetensors").is_file():
            converted(there / "mixtral")
        refused(lambda: tensors(there / "mixtral"), there / "mixtral")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},  # 2**64: 0 in 64 bits
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
        [],
    ],
    ids=str,
)
def test_an_entry_that_lies_is_refused(tmp_path: Path, entry: Any) -> None:
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert refused(lambda: tensors(tmp_path), file)


@given(change=TREE)
@examples(60)
def test_any_index_is_followed_or_named(there: Path, change: Any) -> None:
    index = there / "mixtral" / "model.safetensors.index.json"
    names = tensors(there / "mixtral")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with bent(index, change):
        converted(there / "mixtral")
    index.unlink()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b.safetensors", "..", "\0"])
def test_an_index_names_files_of_its_folder(there: Path, name: str) -> None:
    index = there / "mixtral" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    try:
        said = refused(lambda: tensors(there / "mixtral"), index)
        assert said and "is not in the folder itself" in said
    finally:
        index.unlink()


@given(draw=st.data())
@examples(60)
def test_any_folder_of_parameters_is_exported_or_named(there: Path, draw: st.DataObject) -> None:
    """Its config, the metadata of an array, and values that are cut."""
    ours = there / "ours"
    files = sorted(f for f in ours.rglob("*") if f.is_file() and f.name != "_METADATA")
    file = draw.draw(st.sampled_from([ours / "config.json", *files]))
    json_too = file.suffix == ".json" or file.name == ".zarray"
    with bent(file, draw.draw(TREE if json_too else raw())):
        converted(ours)


@pytest.mark.parametrize("dtype", ["<i4", "|b1", "<c8", "|S4", "<u2"])
def test_parameters_are_floats(there: Path, tmp_path: Path, dtype: str) -> None:
    """Of another type they would be converted silently, or their bits read as another's."""
    shutil.copytree(there / "ours", tmp_path / "ours")
    file = next(f for f in sorted((tmp_path / "ours").rglob(".zarray")))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype, "fill_value": None}))
    (tmp_path / "to").mkdir()
    assert converted(tmp_path / "ours") == 2


class Payload:
    """What a pickle of it does when it is loaded: makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_no_file_is_unpickled(straight: Path, there: Path, tmp_path: Path) -> None:
    """A pickle in the place of every file that is read: it is refused, and not run."""
    mark = tmp_path / "ran"
    payload = pickle.dumps(Payload(mark))
    pickle.loads(payload)
    assert mark.is_dir()  # it would
    mark.rmdir()
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.copytree(there / "mixtral", tmp_path / "mixtral")
    shutil.copytree(there / "ours", tmp_path / "ours")
    (tmp_path / "to").mkdir()
    checkpoint = run / "checkpoints" / "24"
    for file in [f for f in checkpoint.rglob("*") if f.is_file()]:
        with bent(file, lambda _: payload):
            for seal_too in (False, True):
                if seal_too and file.name != seal.FILE:
                    seal.write(checkpoint, ITEMS)
                refused(lambda: open_params(checkpoint).read("embed"), checkpoint)
                refused(lambda: meta.read(checkpoint), checkpoint)
    for name in (record.CONFIG, record.METRICS, record.EVENTS):
        with bent(run / name, lambda _: payload + b"\n"):
            refused(lambda: record.read_config(run))
            refused(lambda name=name: record.read_lines(run / name))
    for folder in ("mixtral", "ours"):
        for file in [f for f in (tmp_path / folder).rglob("*") if f.is_file()]:
            with bent(file, lambda _: payload):
                converted(tmp_path / folder)
    for name in ("a.json", "a.tiktoken", "a.model"):
        (tmp_path / name).write_bytes(payload)
        assert refused(lambda name=name: load_tokenizer(str(tmp_path / name)), name)
    for name in ("hashes", "owners", "bitmap"):
        np.save(tmp_path / f"{name}.npy", np.array([Payload(mark)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Index.open(tmp_path)
    assert not mark.exists()
