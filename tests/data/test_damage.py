from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import prose, texts_of, write

from jaxmoe.data.damage import UNREADABLE, Damaged, hide, open_guarded
from jaxmoe.data.dataset import DataSet
from jaxmoe.errors import UserError

SHARD = 1024  # tokens


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    documents = [("p", str(n), prose(n, 30)) for n in range(40)]
    sources = {"code": documents, "text": documents[:9]}
    return write(tmp_path / "d", sources, shard_bytes=2 * SHARD)


def harm(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    raw[100] ^= 64
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(raw if how == "flipped" else raw[:-10])


def test_a_whole_data_set_reads_as_without_a_guard(data: DataSet):
    guarded, guard = open_guarded(data.folder, "stop")
    assert texts_of(guarded, "code") == texts_of(data, "code")
    assert guarded.sources["code"].tokens == data.sources["code"].tokens
    assert guarded.fingerprint == data.fingerprint
    assert guard.news() == []


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_reading_a_damaged_shard_stops_and_names_it(data: DataSet, how: str):
    harm(data.folder / "code-00002.bin", how)
    guarded, guard = open_guarded(data.folder, "stop")
    code = guarded.sources["code"]
    assert code.tokens == data.sources["code"].tokens
    before = data.sources["text"].read(0, 500).tolist()
    assert guarded.sources["text"].read(0, 500).tolist() == before
    assert len(code.read(0, 2 * SHARD)) == 2 * SHARD  # up to it
    assert guard.news() == []
    for _ in range(2):  # the second time too
        with pytest.raises(Damaged, match="code-00002.bin.*copy it whole again.*damaged=skip"):
            code.read(2 * SHARD - 1, 2 * SHARD + 1)
    assert ["code-00002.bin" in what for what in guard.news()] == [True]
    assert guard.news() == []  # told once


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_shard_is_left_out_and_nothing_else(data: DataSet, how: str):
    whole = data.sources["code"].read(0, data.sources["code"].tokens)
    harm(data.folder / "code-00002.bin", how)
    guarded, guard = open_guarded(data.folder, "skip")
    found = guarded.sources["code"].read(0, len(whole))
    lost = np.arange(len(whole)) // SHARD == 2
    assert (found[lost] == UNREADABLE).all()
    assert (found[~lost] == whole[~lost]).all()
    assert len(guard.news()) == 1


def test_a_shard_is_compared_once(data: DataSet, monkeypatch: pytest.MonkeyPatch):
    from jaxmoe.data import damage

    compared: list[str] = []
    fault = damage._fault
    monkeypatch.setattr(damage, "_fault", lambda p, *of: compared.append(p.name) or fault(p, *of))
    guarded, _ = open_guarded(data.folder, "stop")
    assert compared == ["code.ends.bin", "text.ends.bin"]
    for _ in range(3):
        guarded.sources["code"].read(0, SHARD + 1)
    assert compared[2:] == ["code-00000.bin", "code-00001.bin"]


def test_without_ends_there_are_no_documents(data: DataSet):
    path = data.folder / "code.ends.bin"
    raw = bytearray(path.read_bytes())
    raw[9] ^= 1
    path.write_bytes(raw)
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match="code.ends.bin has changed"):
            open_guarded(data.folder, policy)


def test_what_cannot_be_read_is_no_target_and_no_id(data: DataSet):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 9, (5, 8)).astype(np.int32)
    weights = rng.random((5, 7), np.float32)
    assert hide(tokens, weights, 3)[0] is tokens
    lost = np.zeros((5, 8), bool)
    lost[0, 2:4] = lost[1] = lost[2, 7] = lost[3, 0] = True
    shown: Any = np.where(lost, UNREADABLE, tokens)
    seen, left = hide(shown, weights, 3)
    assert seen.dtype == np.int32
    assert left.dtype == np.float32
    assert (seen == np.where(lost, 3, tokens)).all()
    assert (left == np.where(lost[:, 1:], 0, weights)).all()
