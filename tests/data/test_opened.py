"""A built data set is trained on and inspected like a folder of text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import prose, write

from jaxmoe.config import (
    Config,
    DataConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    as_dict,
    replace,
)
from jaxmoe.data import feed
from jaxmoe.data.__main__ import main
from jaxmoe.data.heldout_sets import move_to_set
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.opened import is_data_set, open_corpus
from jaxmoe.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources of 20 documents, two of them held out."""
    found = tmp_path / "set"
    documents = {
        name: [(f"{name}{i}", f"{name}/{i}.txt", prose(f"{name} {i}")) for i in range(20)]
        for name in ("code", "text")
    }
    write(found, documents)
    move_to_set(found, "held", ["code"], lambda *_: None, packages=["code3", "code7"])
    return found


def config(folder: Path, **model: Any) -> Config:
    mix = (SourceConfig(name="code", weight=3.0), SourceConfig(name="text"))
    return Config(
        model=ModelConfig(vocab_size=264, loss_chunk=8, **model),
        data=DataConfig(path=str(folder), sources=mix),
        train=TrainConfig(steps=20, batch_size=8, seq_len=64),
    )


def test_it_is_streamed_by_its_sources(folder: Path):
    assert is_data_set(folder) and not is_data_set(folder.parent)
    corpus = open_corpus(config(folder))
    stream = feed.open_stream(config(folder), corpus)
    assert isinstance(stream, Mixture)
    assert feed.tokens(corpus) == sum(s.tokens for s in corpus.sources.values())
    rows = stream.rows(3, 0, 8)
    for row, sample in zip(rows.tokens, stream.samples(3, 0, 8), strict=True):
        (span,) = stream.spans(sample)
        whole = corpus.sources[sample.source].read(0, corpus.sources[sample.source].tokens)
        assert (whole[span.start : span.stop + 1] == row).all()
    assert corpus.heldout.name == "held"
    by_size = replace(config(folder), data=replace(config(folder).data, sources=()))
    assert isinstance(feed.open_stream(by_size, corpus), Mixture)


def test_inspect_names_its_documents(folder: Path, capsys: Any, tmp_path: Path):
    file = tmp_path / "mine.py"
    tree = json.dumps(as_dict(config(folder)))
    file.write_text(
        f"from jaxmoe.config import from_json\ndef mine():\n    return from_json({tree!r})\n"
    )
    assert main(["inspect", "--config", str(file), "--step", "3", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)
    corpus = open_corpus(config(folder))
    for one in step["sequences"]:
        said: list[int] = []
        for document in one["documents"]:
            about = corpus.names[one["source"]][document["document"]]
            assert (document["package"], document["name"]) == (about.package, about.name)
            source = corpus.sources[one["source"]]
            start, _ = source.bounds(document["document"])
            said += source.read(*(start + t for t in document["tokens"])).tolist()
        assert one["text"].endswith(corpus.tokenizer.decode(np.array(said)))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_inspect_tells_what_a_damaged_shard_left_out(
    tmp_path: Path, capsys: Any, packing: Any, monkeypatch: pytest.MonkeyPatch
):
    """The documents are those of the whole data, and the places those that training left out."""
    monkeypatch.setenv("COLUMNS", "200")
    found = tmp_path / "set"
    documents = [(f"p{i}", f"{i}.txt", prose(i, 20 + i)) for i in range(30)]
    held = write(found, {"code": documents, "text": documents[:3]}, shard_bytes=2 * 700)
    move_to_set(found, "held", ["text"], lambda *_: None, documents=["2.txt"])
    mix = (SourceConfig(name="code"),)
    whole = replace(
        config(found),
        data=DataConfig(path=str(found), sources=mix, packing=packing, damaged="skip"),
    )
    file = tmp_path / "mine.py"
    tree = json.dumps(as_dict(whole))
    file.write_text(
        f"from jaxmoe.config import from_json\ndef mine():\n    return from_json({tree!r})\n"
    )

    def told(step: int) -> Any:
        assert main(["inspect", "--config", str(file), "--step", str(step), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    steps = range(1, 5)
    before = [told(step) for step in steps]
    shard = found / "code-00001.bin"
    raw = bytearray(shard.read_bytes())
    raw[9] ^= 1
    shard.write_bytes(raw)
    corpus = open_corpus(whole)
    stream = feed.open_stream(whole, corpus)
    lost = 0
    for number, one in zip(steps, before, strict=True):
        drawn = feed.read_rows(stream, whole, number - 1, 0, 8).tokens[:, :-1]
        now = told(number)
        assert [w.count("code-00001.bin has changed") for w in now["damaged"]] == [1] * bool(
            (drawn == -1).any()
        )
        for row, a, b in zip(drawn, one["sequences"], now["sequences"], strict=True):
            skipped = [d.pop("skipped", []) for d in b["documents"]]
            assert a["documents"] == b["documents"]
            places = []
            for document, runs in zip(b["documents"], skipped, strict=True):
                first = held.sources["code"].bounds(document["document"])[0]
                places += [first + n for run in runs for n in range(*run)]
            assert all(700 <= place < 1400 for place in places)
            assert len(places) == (row == -1).sum()
            lost += len(places)
            clean = "tokens of a damaged shard" not in b["text"]
            assert (a["text"] == b["text"]) == clean == (not places)
    assert lost > 100
    worst = next(n for n, one in zip(steps, before, strict=True) if told(n)["damaged"])
    assert main(["inspect", "--config", str(file), "--step", str(worst)]) == 0
    shown = capsys.readouterr().out
    assert "damaged: " in shown and "(skipped " in shown


def test_a_vocabulary_that_is_too_small_is_named(folder: Path):
    small = replace(config(folder), model=ModelConfig(vocab_size=200, loss_chunk=8))
    with pytest.raises(UserError, match="model.vocab_size=200: the tokenizer of .* has 257 ids"):
        open_corpus(small)
