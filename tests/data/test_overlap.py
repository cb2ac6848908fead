import functools
import json
import re
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Document, prose, texts_of, write

from jaxmoe.data import overlap
from jaxmoe.data.__main__ import main
from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.data.heldout_sets import add_set
from jaxmoe.data.heldout_text import Found
from jaxmoe.data.holdout import checked
from jaxmoe.data.overlap import scan, to_drop
from jaxmoe.data.sources import Document as Text
from jaxmoe.data.tokenizer import train_bpe
from jaxmoe.errors import UserError

HELD = [prose(f"held {n}") for n in range(40)]


def hold_out(data: DataSet, texts: list[str], name: str = "held") -> DataSet:
    documents = [
        Text(package="p", name=f"{name}{n}", data=t.encode(), domain="prose")
        for n, t in enumerate(texts)
    ]
    found = Found(documents=tuple(documents), skipped={}, origin={})
    add_set(data.folder, name, found, lambda phase, done: None)
    return open_data_set(data.folder)


def leaks() -> list[str]:
    """Copies of held-out text as they come about, one of each kind."""
    long = prose("around it", 1200)
    return [
        HELD[0],
        HELD[1].upper(),
        re.sub(" ", "\n\t  ", HELD[2]),
        re.sub(r"\s", "", HELD[3]).swapcase(),
        "\u201c" + HELD[4].replace(" ", "\u00a0-- ").lower() + "\u201d",
        long[:3000] + HELD[5].title() + long[3000:],
        prose("before", 400) + HELD[6][: len(HELD[6]) // 2].replace(" ", "\r\n"),
        unicodedata.normalize("NFD", "\u00e9 " + HELD[7]),
    ]


@functools.cache
def pool() -> str:
    rng = np.random.default_rng(6)
    syllables = np.array("bo ce du fi ga hu ji ke zo wy".split())
    drawn = syllables[rng.integers(0, 10, 200_000)]
    return "".join(np.where(rng.random(200_000) < 0.3, " ", drawn))


def documents(count: int, planted: list[str]) -> Iterator[Document]:
    """`count` documents of about 300 bytes, with the planted ones among them."""
    rng = np.random.default_rng(7)
    at = rng.integers(0, len(pool()) - 1000, count)
    sizes = rng.integers(20, 600, count)
    where = dict(zip(places(count, planted), planted, strict=True))
    for number in range(count):
        own = pool()[at[number] : at[number] + sizes[number]]
        yield "p", f"d{number}", where.get(number, own)


def places(count: int, planted: list[str]) -> list[int]:
    """One in each part of the source; at its very ends too."""
    return [round(n * (count - 1) / (len(planted) - 1)) for n in range(len(planted))]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_planted_leaks_are_found_with_none_missed(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    """In 8 of 2,000 documents, whatever was done to whitespace and case."""
    monkeypatch.setattr(overlap, "_RANGE", 50_000)  # tokens: several ranges
    planted = leaks()
    bpe = train_bpe([prose(n) for n in range(50)], 400) if tokenizer == "bpe" else None
    data = hold_out(write(tmp_path / "d", {"prose": documents(2000, planted)}, bpe), HELD)
    row = scan(data, ["held"], ["prose"])["held"]["prose"]
    assert row["drop"] == places(2000, planted)
    assert row["touched"] == row["leaking"] == 8
    assert row["heldout_unchecked"] == 0
    whole = re.sub(r"[\W_]", "", "".join(f"{t}#" for t in HELD[:6] + HELD[7:8]))
    half = re.sub(r"[\W_]", "", HELD[6][: len(HELD[6]) // 2])
    assert row["heldout_covered"] == len(whole) - 7 * 49 + len(half) - 49
    assert row["hits"] == row["heldout_covered"]
    worst = {w["document"]: w for w in row["worst"]}
    assert sorted(worst) == row["drop"]
    for n, place in enumerate(row["drop"]):
        assert worst[place]["name"] == f"d{place}"
        assert worst[place]["of"] == f"held{n}"


@pytest.mark.slow
def test_planted_leaks_are_found_among_many(tmp_path: Path):
    """1 in 10**5 documents; several processes."""
    planted = leaks()
    source = {"prose": documents(800_000, planted)}
    data = hold_out(write(tmp_path / "d", source, shard_bytes=1 << 28), HELD)
    began = time.perf_counter()
    row = scan(data, ["held"], ["prose"], processes=2)["held"]["prose"]
    print(f"{data.manifest['sources']['prose']['bytes']} B in {time.perf_counter() - began:.1f} s")
    assert row["drop"] == places(800_000, planted)
    assert row["touched"] == 8


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write(tmp_path / "d", {"a": documents(300, leaks()), "b": documents(200, leaks()[:3])})
    data = hold_out(hold_out(data, HELD), [prose("other"), HELD[0]], "other")
    asked = (data, ["held", "other"], ["a", "b"])
    alone = scan(*asked)
    monkeypatch.setattr(overlap, "_RANGE", 10_000)
    assert scan(*asked, processes=2) == alone
    assert [alone["other"][s]["leaking"] for s in "ab"] == [1, 1]


def test_words_find_what_letters_find_unless_words_are_cut(tmp_path: Path):
    planted = leaks()
    data = hold_out(write(tmp_path / "d", {"prose": documents(100, planted)}), HELD)
    row = scan(data, ["held"], ["prose"], method="ngram13")["held"]["prose"]
    at = places(100, planted)
    assert row["drop"] == [n for n in at if n != at[3]]  # without whitespace there are no words


def test_what_leaks_is_a_matter_of_shares(tmp_path: Path):
    """The limits at their borders, in windows."""

    def letters(seed: str, count: int) -> str:
        return re.sub(r"[\W_]", "", prose(seed, count))[:count]

    held = letters("held", 10_049)  # 10,000 windows
    short = letters("short", 79)  # 30 windows: fewer than the least that counts
    texts = {
        "1000": held[:1049] + letters("a", 9000),
        "1001": held[:1050] + letters("b", 9000),
        "20 % of itself": held[:149] + letters("c", 351),  # 100 of 451 windows
        "less of itself": held[:109] + letters("d", 341),  # 60 of 401
        "short": short + letters("e", 2000),
        "half of short": short[:64] + letters("f", 2000),
        "less of short": short[:63] + letters("g", 2000),
    }
    data = write(tmp_path / "d", {"prose": [("p", k, v) for k, v in texts.items()]})
    data = hold_out(data, [held, short])
    row = scan(data, ["held"], ["prose"])["held"]["prose"]
    assert [list(texts)[n] for n in row["drop"]] == [
        "1001",
        "20 % of itself",
        "short",
        "half of short",
    ]
    assert row["touched"] == 7


@pytest.fixture
def leaky(tmp_path: Path) -> DataSet:
    planted = leaks()[:3]
    sources = {"code": documents(60, planted), "prose": documents(50, [prose(n) for n in "ab"])}
    return hold_out(write(tmp_path / "d", sources), HELD)


def run(data: DataSet, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert main(["overlap", str(data.folder), "--json", "--processes=1", *more]) == 0
    return json.loads(capsys.readouterr().out)["overlap"]


def print_of(data: DataSet) -> str:
    return data.manifest["heldout"]["held"]["text_fingerprint"]


def test_a_report_is_written_down_and_changes_no_text(leaky: DataSet, capsys: Any):
    shown = run(leaky, capsys)["held"]
    data = open_data_set(leaky.folder, verify=True)
    assert data.fingerprint == leaky.fingerprint
    rows = data.manifest["overlap"][print_of(data)]
    prints = {n: e["fingerprint"] for n, e in data.manifest["sources"].items()}
    assert rows == {prints["code"]: shown["code"], prints["prose"]: shown["prose"]}
    assert (shown["code"]["leaking"], shown["code"]["dropped"]) == (3, 0)
    assert checked(data.manifest, print_of(data), data.fingerprint) == 3
    assert main(["overlap", str(leaky.folder), "--processes=1"]) == 0
    assert "d59 shares" in capsys.readouterr().out


def test_dropping_leaves_every_other_document_as_it_was(leaky: DataSet, capsys: Any):
    before = texts_of(leaky, "code")
    titles = [leaky.names["code"][n] for n in range(60)]
    run(leaky, capsys, "--drop")
    data = open_data_set(leaky.folder, verify=True)
    gone = places(60, ["", "", ""])
    assert texts_of(data, "code") == [t for n, t in enumerate(before) if n not in gone]
    names = [data.names["code"][n] for n in range(57)]
    assert names == [t for n, t in enumerate(titles) if n not in gone]
    code = data.manifest["sources"]["code"]
    assert code["removed"] == 3
    assert code["bytes"] == sum(len(t.encode()) for t in texts_of(data, "code"))
    assert data.manifest["sources"]["prose"] == leaky.manifest["sources"]["prose"]
    left = {f.name for f in leaky.folder.iterdir()}
    assert left == {*data.manifest["files"], "manifest.json", ".lock"}
    row = data.manifest["overlap"][print_of(data)][code["fingerprint"]]
    assert (row["leaking"], row["dropped"]) == (0, 3)
    assert checked(data.manifest, print_of(data), data.fingerprint) == 0
    assert run(data, capsys)["held"]["code"]["touched"] == 0


def test_a_source_that_is_written_again_as_new_has_the_same_fingerprint_of_its_text(
    leaky: DataSet, tmp_path: Path, capsys: Any
):
    kept = [d for n, d in enumerate(documents(60, leaks()[:3])) if n not in places(60, [""] * 3)]
    fresh = write(tmp_path / "fresh", {"code": kept}).manifest["sources"]["code"]
    run(leaky, capsys, "--drop")
    code = open_data_set(leaky.folder).manifest["sources"]["code"]
    assert code["text_fingerprint"] == fresh["text_fingerprint"]


def test_a_kill_before_the_manifest_leaves_the_data_set_as_it_was(
    leaky: DataSet, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxmoe.data.heldout_sets.write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["overlap", str(leaky.folder), "--drop", "--processes=1"])
    monkeypatch.undo()
    assert open_data_set(leaky.folder, verify=True).manifest == leaky.manifest
    run(leaky, capsys, "--drop")
    data = open_data_set(leaky.folder, verify=True)
    assert {f.name for f in leaky.folder.iterdir()} == {
        *data.manifest["files"],
        "manifest.json",
        ".lock",
    }


def test_what_was_clean_is_clean_without_some_documents_and_the_rest_is_asked_again(
    leaky: DataSet, capsys: Any
):
    data = hold_out(leaky, [prose("clean")], "clean")
    data = hold_out(data, [leaks()[0], prose("touching")], "dirty")
    run(data, capsys)
    run(data, capsys, "--drop", "--set=held")
    data = open_data_set(data.folder)
    entries = data.manifest["heldout"]
    assert checked(data.manifest, entries["clean"]["text_fingerprint"], data.fingerprint) == 0
    with pytest.raises(UserError, match="not compared with source 'code' of data"):
        checked(data.manifest, entries["dirty"]["text_fingerprint"], data.fingerprint)


def test_a_set_that_was_not_compared_with_all_of_it_is_refused(leaky: DataSet, capsys: Any):
    with pytest.raises(UserError, match="set held .* 'code', source 'prose'.*jaxmoe.data over"):
        checked(leaky.manifest, print_of(leaky), leaky.fingerprint)
    run(leaky, capsys, "--source=code")
    data = open_data_set(leaky.folder)
    with pytest.raises(UserError, match="not compared with source 'prose' of"):
        checked(data.manifest, print_of(data), data.fingerprint)
    run(leaky, capsys, "--source=prose")
    data = open_data_set(leaky.folder)
    assert checked(data.manifest, print_of(data) + "/12+3", data.fingerprint) == 3
    with pytest.raises(UserError, match="is not the data set's"):
        checked(data.manifest, print_of(data), "0" * 16)


def test_mistakes_are_told_in_a_line(leaky: DataSet, capsys: Any, tmp_path: Path):
    bare = write(tmp_path / "bare", {"code": documents(9, leaks()[:2])})
    for folder, more, said in (
        (leaky.folder, ["--set=hold"], "no held-out set 'hold'; it has held"),
        (leaky.folder, ["--source=text"], "no source 'text'; it has code, prose"),
        (bare.folder, [], "python -m jaxmoe.data holdout"),
        (tmp_path, [], "no manifest.json"),
    ):
        assert main(["overlap", str(folder), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / ".lock").exists()


def test_leaks_of_two_sets_are_dropped_at_once(leaky: DataSet):
    data = hold_out(leaky, [leaks()[1], prose("b")], "more")
    rows = scan(data, ["held", "more"], ["code", "prose"])
    assert rows["more"]["prose"]["leaking"] == 1  # the source of prose holds "b"
    assert to_drop(rows) == {"code": {0, 30, 59}, "prose": {49}}
