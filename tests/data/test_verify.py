import json
from pathlib import Path
from typing import Any

import pytest
from datasets import prose, write

from jaxmoe.config import DataConfig
from jaxmoe.data.__main__ import main
from jaxmoe.data.cache import prepare
from jaxmoe.data.dataset import DataSet
from jaxmoe.data.verify import verify


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    documents = [("p", str(n), prose(n)) for n in range(40)]
    return write(tmp_path / "d", {"code": documents}, shard_bytes=4096)


def test_every_file_of_a_whole_data_set_is_read(data: DataSet, capsys: Any):
    seen: list[float] = []
    verdicts = verify(data.folder, lambda phase, done: seen.append(done))
    assert {v.file for v in verdicts} == {f.name for f in data.folder.iterdir()} - {"manifest.json"}
    assert len(verdicts) > 5  # several shards
    assert all(v.fault is None for v in verdicts)
    assert seen[-1] == 1
    assert main(["verify", str(data.folder)]) == 0
    assert "0 of" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_the_damaged_file_is_named_and_no_other(data: DataSet, capsys: Any, damage: str):
    shard = data.folder / "code-00001.bin"
    raw = bytearray(shard.read_bytes())
    raw[1234] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(raw if damage == "flipped" else raw[:-2])
    assert main(["verify", str(data.folder), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["damaged"] == 1
    (bad,) = (f for f in shown["files"] if f["fault"])
    assert bad["file"] == "code-00001.bin"
    said = {"flipped": "has changed", "truncated": "instead of 4,096", "missing": "missing"}
    assert said[damage] in bad["fault"]
    assert main(["verify", str(data.folder)]) == 1
    assert "1 of" in capsys.readouterr().out


def test_a_folder_of_the_cache_too(config: DataConfig):
    corpus = prepare(config, 300)
    kinds = ("-00000.bin", ".ends.bin", ".names.jsonl")
    parts = {f"{stem}{kind}" for stem in ("train", "heldout.holdout") for kind in kinds}
    assert {v.file: v.fault for v in verify(corpus.folder)} == dict.fromkeys(
        (*parts, "tokenizer.json")
    )


@pytest.mark.parametrize("text", [None, "", "[]", '{"files": {"a": {}}}'])
def test_a_folder_without_a_manifest(tmp_path: Path, capsys: Any, text: str | None):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert main(["verify", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
