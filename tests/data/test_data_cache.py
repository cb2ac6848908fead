import dataclasses
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmoe.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from jaxmoe.data import feed
from jaxmoe.data.__main__ import main
from jaxmoe.data.cache import Corpus, load, prepare
from jaxmoe.data.damage import Damaged
from jaxmoe.data.dataset import open_data_set
from jaxmoe.data.holdout import checked
from jaxmoe.data.opened import open_corpus
from jaxmoe.errors import UserError

# A process that builds; hold: seconds in its first phase of work; die: the phase it is killed in.
_CHILD = """
import json, os, signal, sys, time
from jaxmoe.config import DataConfig
from jaxmoe.data import cache
settings, hold, die = json.loads(sys.argv[1])
phases = []
def report(phase, fraction):
    if phase == "read" and fraction == 0.0:
        time.sleep(hold)
    phases.append(phase)
    if phase == die and fraction == 1.0:
        os.kill(os.getpid(), signal.SIGKILL)
if die == "rename":
    cache.os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
settings["holdout"] = tuple(settings["holdout"])
print("ready", flush=True)
sys.stdin.readline()
corpus = cache.prepare(DataConfig(**settings), 300, report)
print(json.dumps([corpus.fingerprint, sorted(set(phases))]))
"""


def _child(config: DataConfig, hold: float = 0.0, die: str = "") -> subprocess.Popen[str]:
    argument = json.dumps([dataclasses.asdict(config), hold, die])
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _CHILD, argument]
    child = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def _folders(config: DataConfig) -> list[Path]:
    return sorted(p for p in Path(str(config.cache)).iterdir() if p.is_dir())


def _documents(corpus: Corpus) -> list[str]:
    ends = np.fromfile(corpus.folder / "train.ends.bin", "<i8")
    starts = [1, *ends[:-1]]
    return [
        corpus.tokenizer.decode(corpus.train[a : b - 1]) for a, b in zip(starts, ends, strict=True)
    ]


def _trained(corpus: Corpus) -> Any:
    return corpus.manifest["sources"]["train"]


def _held(corpus: Corpus) -> Any:
    return corpus.manifest["heldout"]["holdout"]


def _phases(config: DataConfig, **kwargs: Any) -> tuple[Corpus, list[str]]:
    phases: list[str] = []
    corpus = prepare(config, 300, lambda phase, fraction: phases.append(phase), **kwargs)
    return corpus, phases


def test_streams_are_the_documents_between_ends_of_text(config: DataConfig, texts: Path):
    corpus = prepare(config, 300)
    eot = corpus.tokenizer.eot
    held = _held(corpus)["origin"]["names"]
    assert len(held) == 1
    whole = {p.read_text() for p in texts.rglob("*.txt")}
    heldout = {p.read_text() for p in (texts / held[0]).iterdir()}
    assert set(_documents(corpus)) == whole - heldout
    for tokens in (corpus.train[:], corpus.heldout.tokens):
        assert tokens[0] == tokens[-1] == eot
    assert (corpus.train[:] == eot).sum() == _trained(corpus)["documents"] + 1
    parts = corpus.tokenizer.decode(corpus.heldout.tokens).split("<|eot|>")
    assert set(parts[1:-1]) == heldout


@pytest.mark.parametrize("names", [(), ("p3", "p17")])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_held_out_packages_are_nowhere_in_training(config: DataConfig, names: Any, kind: Any):
    corpus = prepare(replace(config, holdout=names, tokenizer=kind), 300)
    held = _held(corpus)["origin"]["names"]
    assert not names or tuple(held) == tuple(sorted(names))
    train = corpus.tokenizer.decode(corpus.train[:])
    heldout = corpus.tokenizer.decode(corpus.heldout.tokens)
    for package in range(24):
        marked = heldout if f"p{package}" in held else train
        other = train if f"p{package}" in held else heldout
        assert f"mark{package}x " in marked
        assert f"mark{package}x " not in other


def test_merges_are_learnt_from_training_text_alone(config: DataConfig, texts: Path):
    config = replace(config, tokenizer="bpe", holdout=("p3",))
    before = prepare(config, 300)
    (texts / "p3" / "0.txt").write_text("zqzqzq " * 5000)
    after = prepare(config, 300)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.heldout.fingerprint != before.heldout.fingerprint


def test_held_out_numbers_are_of_exactly_its_bytes(config: DataConfig):
    corpus = prepare(config, 300)
    text = corpus.tokenizer.decode(corpus.heldout.tokens).replace("<|eot|>", "").encode()
    assert corpus.heldout.bytes == len(text)
    assert corpus.heldout.xz_bits_per_byte == 8 * len(lzma.compress(text, preset=9)) / len(text)
    other = prepare(replace(config, tokenizer="bpe"), 300)
    assert other.heldout.fingerprint == corpus.heldout.fingerprint
    assert other.fingerprint != corpus.fingerprint


def test_identical_and_copied_documents_are_dropped(config: DataConfig, texts: Path):
    held = (texts / "p3" / "0.txt").read_text()
    (texts / "p5" / "same.txt").write_text(held)
    (texts / "p6" / "copied.txt").write_text("a word before " + held.replace("\n", "\n  "))
    (texts / "p7" / "twice.txt").write_text((texts / "p8" / "0.txt").read_text())
    (texts / "p9" / "latin.txt").write_bytes(b"\xe9" * 300)
    corpus = prepare(replace(config, holdout=("p3",)), 300)
    train = _trained(corpus)
    assert train["dropped"] == {"identical to another": 2, "shares passages with held-out text": 1}
    assert train["documents"] == 23 * 3
    assert "mark3x" not in corpus.tokenizer.decode(corpus.train[:])
    assert corpus.manifest["skipped"] == {"not UTF-8": 1}


def test_counts_add_up(config: DataConfig):
    corpus = prepare(replace(config, tokenizer="bpe", max_bytes=40_000), 300)
    train, held = _trained(corpus), _held(corpus)
    parts = [(train, train["packages"], corpus.train), (train, train["domains"], corpus.train)]
    for summary, rows, tokens in [*parts, (held, held["domains"], corpus.heldout.tokens)]:
        for count in ("documents", "bytes"):
            assert summary[count] == sum(row[count] for row in rows.values())
        assert summary["tokens"] == len(tokens)
        assert len(tokens) == 1 + sum(row["tokens"] for row in rows.values())
    assert sum(held["origin"]["packages"].values()) == held["documents"]
    assert _trained(corpus)["bytes"] <= 40_000
    assert _trained(corpus)["bytes"] == sum(len(d.encode()) for d in _documents(corpus))


def test_two_builds_of_the_same_text_are_the_same_bytes(config: DataConfig, tmp_path: Path):
    config = replace(config, tokenizer="bpe")
    a = prepare(config, 300)
    b = prepare(replace(config, cache=str(tmp_path / "other")), 300)
    assert a.folder.name == b.folder.name
    for file in a.folder.iterdir():
        assert file.read_bytes() == (b.folder / file.name).read_bytes()


def test_the_cache_is_found_again_until_something_changes(config: DataConfig, texts: Path):
    first, phases = _phases(config)
    assert "encode" in phases
    again, phases = _phases(config)
    assert "encode" not in phases
    assert again.fingerprint == first.fingerprint
    assert prepare(config, 301).folder == first.folder  # bytes do not depend on it
    changed = [
        prepare(replace(config, holdout=("p3",)), 300),
        prepare(replace(config, max_bytes=40_000), 300),
        prepare(replace(config, holdout_bytes=2_000), 300),
    ]
    os.utime(texts / "p3" / "0.txt", ns=(1, 1))
    changed.append(prepare(config, 300))
    assert len({c.folder for c in [first, *changed]}) == 5


def test_where_the_cache_is(config: DataConfig, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("JAXMOE_CACHE", str(tmp_path / "from_env"))
    assert prepare(replace(config, cache=None), 300).folder.parent.name == "from_env"
    monkeypatch.delenv("JAXMOE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = prepare(replace(config, cache=None), 300).folder
    assert folder.parent == tmp_path / "home" / ".cache" / "jaxmoe"


def test_a_damaged_data_set_is_refused_by_load_and_built_again_by_prepare(config: DataConfig):
    corpus = prepare(config, 300)
    good = {p.name: p.read_bytes() for p in corpus.folder.iterdir()}
    damage = {name: data[:-2] for name, data in good.items()}
    damage["heldout.holdout-00000.bin"] = b""
    for name, data in damage.items():
        (corpus.folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"(?s){corpus.folder}.*{name}.*delete"):
            load(corpus.folder)
        again, phases = _phases(config)
        assert any(p.startswith("building again") and name in p for p in phases)
        assert {p.name: p.read_bytes() for p in again.folder.iterdir()} == good
    (corpus.folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing; delete"):
        load(corpus.folder)


def test_verify_sees_a_flipped_bit(config: DataConfig):
    corpus = prepare(config, 300)
    data = bytearray((corpus.folder / "train-00000.bin").read_bytes())
    data[100] ^= 1
    (corpus.folder / "train-00000.bin").write_bytes(data)
    load(corpus.folder)
    with pytest.raises(UserError, match="train-00000.bin has changed"):
        load(corpus.folder, verify=True)
    again, phases = _phases(config, verify=True)
    assert again.fingerprint == corpus.fingerprint
    assert any(p.startswith("building again") for p in phases)


def test_another_format_is_not_read(config: DataConfig):
    corpus = prepare(config, 300)
    manifest = corpus.folder / "manifest.json"
    manifest.write_text(json.dumps({**corpus.manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load(corpus.folder)


def test_two_processes_build_it_once(config: DataConfig):
    children = [_child(config, hold=1.0), _child(config, hold=1.0)]
    outputs = [json.loads(out) for out in _finish(children)]
    assert outputs[0][0] == outputs[1][0]
    assert sorted("encode" in phases for _, phases in outputs) == [False, True]
    waited = [any("waiting" in p for p in phases) for _, phases in outputs]
    assert sorted(waited) == [False, True]
    (folder,) = _folders(config)
    assert load(folder, verify=True).fingerprint == outputs[0][0]


def _finish(children: list[subprocess.Popen[str]]) -> list[str]:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=30)[0] for child in children]
    assert [c.returncode for c in children] == [0] * len(children)
    return outputs


@pytest.mark.parametrize("phase", ["tokenizer", "encode", "rename"])
def test_a_killed_build_leaves_nothing_that_is_accepted(config: DataConfig, phase: str):
    child = _child(config, die=phase)
    child.communicate("go\n", timeout=30)
    assert child.returncode == -signal.SIGKILL
    (left,) = _folders(config)
    assert ".tmp-" in left.name
    corpus, phases = _phases(config)
    assert "encode" in phases
    assert _folders(config) == [corpus.folder]
    assert load(corpus.folder, verify=True).fingerprint == corpus.fingerprint


def test_a_failed_build_leaves_nothing(config: DataConfig):
    with pytest.raises(UserError, match="data.holdout_bytes=10.*set it to"):
        prepare(replace(config, holdout_bytes=10), 300)
    with pytest.raises(UserError, match="data.max_bytes=10: nothing"):
        prepare(replace(config, max_bytes=10), 300)
    assert _folders(config) == []


def test_an_unwritable_cache_is_a_users_error(config: DataConfig, monkeypatch: Any):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="JAXMOE_CACHE"):
        prepare(config, 300)


def test_what_is_installed_here(tmp_path: Path):
    config = DataConfig(
        holdout=("email", "json"),
        tokenizer="bytes",
        max_bytes=300_000,
        holdout_bytes=60_000,
        cache=str(tmp_path),
    )
    corpus = prepare(config, 300)
    assert set(_held(corpus)["origin"]["packages"]) <= {"email", "json"}
    assert not {"email", "json"} & set(_trained(corpus)["packages"])
    assert 0.9 * 300_000 < _trained(corpus)["bytes"] <= 300_000
    assert 0.9 * 60_000 < corpus.heldout.bytes <= 60_000
    assert 1.0 < corpus.heldout.xz_bits_per_byte < 3.5
    assert str(Path.home()) not in (corpus.folder / "manifest.json").read_text()


def test_the_cache_says_what_its_held_out_text_was_compared_with(config: DataConfig, texts: Path):
    (texts / "p4" / "0.txt").write_text((texts / "p3" / "0.txt").read_text() + " a leak")
    config = replace(config, holdout=("p3",))
    corpus = prepare(config, 300)
    held = corpus.heldout.fingerprint
    assert checked(corpus.manifest, held, corpus.fingerprint) == 0
    assert corpus.manifest["overlap"][held][_trained(corpus)["fingerprint"]]["dropped"] == 1
    with pytest.raises(UserError, match="training text ffff is not the data set's"):
        checked(corpus.manifest, held, "ffff")
    with pytest.raises(UserError, match="held-out set 0000 was not compared"):
        checked(corpus.manifest, "0000", corpus.fingerprint)


def test_a_prepared_folder_is_a_data_set_like_any_other(config: DataConfig, capsys: Any):
    """Its documents have names, `overlap` finds it clean, and by its path it is the same stream."""
    corpus = prepare(config, 300)
    names = corpus.names["train"]
    assert len(names) == corpus.sources["train"].documents
    for number in (0, len(names) - 1):
        start, stop = corpus.sources["train"].bounds(number)
        text = corpus.tokenizer.decode(corpus.train[start : stop - 1])
        assert (Path(str(config.path)) / names[number].name).read_text() == text
    held = open_data_set(corpus.folder).heldout_names["holdout"]
    order = [hashlib.sha256(held[n].name.encode()).digest() for n in range(len(held))]
    assert order == sorted(order) and len(order) > 1  # as of a sample, and of runs before
    assert main(["overlap", str(corpus.folder), "--json"]) == 0
    assert '"leaking": 0' in capsys.readouterr().out
    whole = Config(model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=4, seq_len=32))
    opened = open_corpus(replace(whole, data=DataConfig(path=str(corpus.folder))))
    assert opened.plain and opened.fingerprint == corpus.fingerprint
    a, b = (feed.read_rows(feed.open_stream(whole, c), whole, 3, 0, 4) for c in (corpus, opened))
    assert (a.tokens == b.tokens).all()


def test_a_cache_of_format_1_is_refused_in_one_line(tmp_path: Path):
    """By its path; `prepare` never comes across it, since its key is another."""
    manifest = {"format": 1, "files": {"train.bin": {"bytes": 2, "sha256": "0"}}, "train": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    whole = Config(data=DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="format 1 is not 2; .*delete the folder") as caught:
        open_corpus(whole)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_the_cache_ends_a_run_that_reads_it(config: DataConfig):
    corpus = prepare(config, 300)
    file = corpus.folder / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    again = prepare(config, 300)
    with pytest.raises(Damaged, match="train-00000.bin has changed.*; delete this folder"):
        again.train[:8]
    assert again.guard is not None and len(again.guard.news()) == 1
    skipped = prepare(replace(config, damaged="skip"), 300)
    assert (skipped.train[:8] == -1).all()
