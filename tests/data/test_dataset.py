import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmoe.data import dataset
from jaxmoe.data.dataset import DocumentName, SourceWriter, open_data_set
from jaxmoe.data.tokenizer import bytes_tokenizer
from jaxmoe.errors import UserError

_TEXTS = ["", "one", "two words", "\u00e9" * 40, "x" * 333]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two sources of bytes: `a` in shards of 100 bytes, and `b` empty of documents but one."""
    tokenizer = bytes_tokenizer()
    files: dict[str, Any] = dataset.write_tokenizer(tmp_path, tokenizer)
    entries = {}
    for name, texts, shard in (("a", _TEXTS, 100), ("b", _TEXTS[1:2], 1 << 30)):
        writer = SourceWriter(tmp_path, name, tokenizer, shard)
        for number, text in enumerate(texts):
            ids = tokenizer.encode_batch([text])[0]
            writer.add("pack", f"{name}/{number}\n\udc80", text.encode(), ids)
        entries[name], rows = writer.close(domain="prose", licence="MIT")
        files |= rows
    dataset.write_manifest(tmp_path, dataset.new_manifest(tokenizer, entries, files))
    return tmp_path


def test_what_is_written_is_read_back_over_the_shards(stored: Path):
    data = open_data_set(stored, verify=True)
    source = data.sources["a"]
    assert len(data.manifest["sources"]["a"]["shards"]) == -(-2 * source.tokens // 100) > 3
    assert (source.documents, source.domain) == (len(_TEXTS), "prose")
    assert source.tokens == 1 + sum(len(t.encode()) + 1 for t in _TEXTS)
    assert source.read(0, 1).tolist() == [data.tokenizer.eot]
    for i, text in enumerate(_TEXTS):
        start, stop = source.bounds(i)
        assert data.tokenizer.decode(source.read(start, stop - 1)) == text
        assert source.read(stop - 1, stop).tolist() == [data.tokenizer.eot]
        name = DocumentName("pack", f"a/{i}\n\udc80", len(text.encode()))
        assert data.names["a"][i] == name
    with pytest.raises(IndexError, match="document 5 of 5"):
        data.names["a"][5]


def test_a_heldout_set_leaves_the_fingerprint_of_what_is_trained_on(stored: Path):
    before = open_data_set(stored)
    manifest = json.loads((stored / "manifest.json").read_text())
    manifest["heldout"]["b"] = manifest["sources"]["b"]
    dataset.write_manifest(stored, manifest)
    after = open_data_set(stored)
    assert after.heldout["b"].documents == 1
    assert after.fingerprint == before.fingerprint
    del manifest["sources"]["b"]
    dataset.write_manifest(stored, manifest)
    assert open_data_set(stored).fingerprint != before.fingerprint


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("file", ["a-00001.bin", "a.ends.bin", "b.names.jsonl", "tokenizer.json"])
@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _flip])
def test_a_damaged_file_is_named(stored: Path, file: str, damage: Any):
    damage(stored / file)
    with pytest.raises(UserError, match=file) as caught:
        open_data_set(stored, verify=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no manifest.json"),
        ("{", "manifest.json: "),
        ("[]", "format None is not 2"),
        ('{"format": 1}', "format 1 is not 2"),
    ],
)
def test_a_manifest_that_is_none_is_a_users_error(stored: Path, text: str | None, message: str):
    path = stored / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_data_set(stored)


def test_a_manifest_cannot_name_files_elsewhere(stored: Path):
    manifest = json.loads((stored / "manifest.json").read_text())
    manifest["files"]["../x"] = {"bytes": 0, "sha256": ""}
    dataset.write_manifest(stored, manifest)
    with pytest.raises(UserError, match=r"'../x' is not in the folder"):
        open_data_set(stored)


def test_a_tokenizer_of_many_ids_has_four_bytes_a_token(tmp_path: Path):
    tokenizer = bytes_tokenizer()
    tokenizer.dtype = np.dtype("<u4")  # as one with more than 65,536 ids has
    writer = SourceWriter(tmp_path, "a", tokenizer, 10)
    writer.add("p", "n", b"", np.array([70_000, 3], np.uint32))
    entry, files = writer.close(domain="code")
    assert [files[s]["bytes"] for s in entry["shards"]] == [8, 8]
    assert np.fromfile(tmp_path / entry["shards"][0], "<u4").tolist() == [256, 70_000]
