"""Data sets, tokenizers and archives that are cut, edited or made to do harm."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from datasets import prose, write
from hostile import asked, bent, examples, of_json, of_lines, raw, refused, snapshot
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxmoe.data import feed, fetch
from jaxmoe.data.__main__ import main
from jaxmoe.data.damage import open_guarded
from jaxmoe.data.heldout_sets import add_set, corpus_of
from jaxmoe.data.heldout_text import from_path, read_pins
from jaxmoe.data.opened import open_corpus
from jaxmoe.data.pieces import Piece
from jaxmoe.data.readers import Fault, Text, read_piece
from jaxmoe.data.remote import open_remote
from jaxmoe.data.tokenizer import Tokenizer
from jaxmoe.data.tokenizer_files import load_tokenizer, save_tokenizer, train_tokenizer
from jaxmoe.errors import UserError

TREE = st.one_of(raw(), of_json(), of_json(), of_json())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two sources and a held-out set that was compared with them."""
    folder = tmp_path_factory.mktemp("made")
    sources = {
        "code": [("p", f"{n}.py", prose(n)) for n in range(6)],
        "notes": [("q", f"{n}.txt", prose(100 + n)) for n in range(4)],
    }
    write(folder / "set", sources)
    (folder / "held.txt").write_text(prose("held"))
    add_set(folder / "set", "wiki", from_path(folder / "held.txt"), lambda *_: None)
    assert asked(main, "overlap", str(folder / "set"), "--processes", "1")[0] == 0
    return folder / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def read_all(folder: Path) -> str | None:
    """As training and inspection read it: every token, document and name."""

    def read() -> None:
        data, guard = open_guarded(folder, "stop")
        corpus_of(data, guard)
        for name, source in data.sources.items():
            assert source.read(0, source.tokens).max() < data.tokenizer.vocab_size
            for number in range(source.documents):
                begin, end = source.bounds(number)
                assert 0 < begin < end <= source.tokens
                assert isinstance(data.names[name][number].package, str)

    return refused(read)


@given(change=TREE)
@examples(250)
def test_any_manifest_is_a_data_set_or_named(made: Path, change: Any) -> None:
    with bent(made / "manifest.json", change):
        read_all(made)
        asked(main, "verify", str(made), "--json")
        asked(main, "overlap", str(made), "--processes", "1", "--json")


@given(change=TREE)
@examples(60)
def test_any_manifest_is_trained_on_or_named(made: Path, change: Any) -> None:
    """Where it is no data set's manifest at all, the folder is one of texts."""
    config = Config(
        data=DataConfig(path=str(made), tokenizer="bytes", cache=str(made.parent / "cache")),
        model=ModelConfig(vocab_size=264),
        train=TrainConfig(seq_len=16, batch_size=2, steps=3),
    )

    def draw() -> None:
        stream = feed.open_stream(config, open_corpus(config))
        feed.read_rows(stream, config, 0, 0, 2)

    with bent(made / "manifest.json", change):
        refused(draw)


@given(change=TREE)
@examples(100)
def test_any_manifest_at_a_url_is_a_data_set_or_named(made: Path, change: Any) -> None:
    cache = made.parent / "remote"
    before = snapshot(made)
    with bent(made / "manifest.json", change):
        refused(lambda: corpus_of(*open_remote(f"file://{made}/", cache, "stop"), remote=True))
    assert before.keys() == snapshot(made).keys()


SEALED = ("code.ends.bin", "code.names.jsonl", "code-00000.bin", "tokenizer.json") + (
    *("heldout.wiki.ends.bin", "heldout.wiki-00000.bin", "heldout.wiki.names.jsonl"),
)


def sealed(folder: Path, name: str) -> None:
    """The manifest says the size and sum that the file has now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    raw = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", SEALED)
@given(draw=st.data())
@examples(40)
def test_any_file_under_a_true_sum_is_read_or_named(
    copy: Path, name: str, draw: st.DataObject
) -> None:
    """Whoever makes a data set also makes its sums: offsets, ids and names are looked at too."""
    kinds = {"jsonl": of_lines(), "json": of_json()}
    suffix = name.rpartition(".")[2]
    change = draw.draw(st.one_of(raw(), kinds[suffix]) if suffix in kinds else raw())
    kept = (copy / "manifest.json").read_bytes()
    with bent(copy / name, change):
        if (copy / name).is_file():
            sealed(copy, name)
        read_all(copy)
        asked(main, "overlap", str(copy), "--processes", "1", "--json")
    (copy / "manifest.json").write_bytes(kept)


@pytest.mark.parametrize("ids", [[300], [65535], [256, 9999, 256]], ids=str)
def test_an_id_that_no_tokenizer_has_is_found_when_it_is_read(copy: Path, ids: list[int]) -> None:
    """Its embedding would silently be the last one's."""
    file = copy / "code-00000.bin"
    raw = bytearray(file.read_bytes())
    for place, number in enumerate(ids, 40):
        raw[2 * place : 2 * place + 2] = number.to_bytes(2, "little")
    file.write_bytes(raw)
    sealed(copy, file.name)
    said = read_all(copy)
    assert said and "source 'code': token" in said and "its tokenizer has 257 ids" in said


@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/x", "..", "", ".", "a/b", "a\\b", "\0", "x" * 300, "manifest.json/../../y"],
)
@pytest.mark.parametrize("place", ["source", "shard", "names", "file", "heldout"])
def test_no_name_in_a_manifest_leads_out(copy: Path, name: str, place: str) -> None:
    """Sources' names begin those of files that are written; files that are no longer named go."""
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["sources"]["code"]
    if place == "source":
        manifest["sources"] = {name: entry}
    elif place == "heldout":
        manifest["heldout"] = {name: manifest["heldout"]["wiki"]}
    elif place == "file":
        manifest["files"][name] = {"bytes": 0, "sha256": ""}
    else:
        manifest["files"][name] = manifest["files"][entry["names"]]
        entry["shards" if place == "shard" else "names"] = [name] if place == "shard" else name
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy.parent / "x").write_text("somebody else's")
    before = snapshot(copy.parent)
    held = copy.parent.parent / "held.txt"
    held.write_text(prose("more"))
    for argv in (
        ["holdout", str(copy), "part", "--source", "*", "--share", "0.5"],
        ["holdout", str(copy), "wiki", "--from", str(held), "--replace"],
        ["overlap", str(copy), "--processes", "1", "--drop"],
        ["verify", str(copy)],
    ):
        of_files_alone = argv[0] == "verify" and place != "file"
        asked(main, *argv, codes=(0,) if of_files_alone else ())
    assert snapshot(copy.parent) == before


def test_a_size_that_no_file_has_is_no_endless_reading(copy: Path, tmp_path: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for row in manifest["files"].values():
        row["bytes"] += 1 << 50
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = refused(lambda: open_remote(f"file://{copy}/", tmp_path / "cache", "stop"))
    assert said and "is not as it was written" in said
    assert asked(main, "verify", f"file://{copy}/")[0] == 1


# Tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One in three of the four forms; the fourth, sentencepiece, where its library is."""
    folder = tmp_path_factory.mktemp("tokenizers")
    learnt = train_tokenizer([prose(n) for n in range(20)], 300)
    for name in ("a.json", "a.tiktoken"):
        save_tokenizer(learnt, folder / name, {})
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(n) for n in range(50)]),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "a.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("name", ["a.json", "a.tiktoken", "a.tiktoken.json", "a.model"])
@given(draw=st.data())
@examples(120)
def test_any_tokenizer_file_is_one_or_named(
    tokenizers: Path, name: str, draw: st.DataObject
) -> None:
    change = draw.draw(TREE if name.endswith("json") else raw())
    text = "def f(x):\n    return  x + 1\n"

    def use() -> None:
        one = load_tokenizer(str(tokenizers / name.removesuffix(".tiktoken.json")))
        if name == "a.tiktoken.json":
            one = load_tokenizer(str(tokenizers / "a.tiktoken"))
        (ids,) = one.encode_batch([text])
        one.decode(ids)
        one.token_bytes()

    with bent(tokenizers / name, change):
        refused(use, tokenizers)


def test_ids_are_not_so_many_that_tables_fill_the_memory(tokenizers: Path) -> None:
    tree = json.loads((tokenizers / "a.json").read_text())
    tree["model"]["vocab"]["!"] = 2**31
    with pytest.raises(UserError, match="an id of 2147483648"):
        Tokenizer(json.dumps(tree))


# Archives and texts


def piece(archive: Path, member: fetch.Member) -> Piece:
    """As a recipe lists it."""
    start = max(member.start, 0)
    where = {"path": str(archive), "name": member.name, "stamp": "", "start": start}
    more = {"stop": member.start + member.size, "size": member.size, "extract": "text"}
    return Piece(source="s", kind="member", package="p", split="", screen=False, **where, **more)


NAMES = st.one_of(
    st.sampled_from(
        ["../../evil", "/tmp/evil", "a/../../evil", "C:\\evil", "..\\evil", ".", "a\0b"]
    ),
    st.text(max_size=8),
)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@given(names=st.lists(NAMES, max_size=4), change=st.one_of(st.just(lambda data: data), raw()))
@examples(120)
def test_any_archive_is_read_in_place_or_named(
    tmp_path: Path, kind: str, names: list[str], change: Any
) -> None:
    """Nothing is unpacked; names that lead out are counted, and nothing is read by them."""
    folder = tmp_path / "archives"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    archive = folder / f"a.{'whl' if kind == 'zip' else 'tar'}"
    pack(archive, names)
    with bent(archive, change):
        before = snapshot(tmp_path)

        def read() -> None:
            for member in fetch.members(archive)[0]:
                path = PurePosixPath(member.name)
                assert not path.is_absolute() and ".." not in path.parts
                for found in read_piece(piece(archive, member)):
                    assert not isinstance(found, Text) or found.data

        refused(read, archive)
        assert snapshot(tmp_path) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")  # of zipfile, which is asked for them here
def pack(archive: Path, names: list[str]) -> None:
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w", errors="surrogateescape") as tar:
            for name in names:
                info = tarfile.TarInfo(name.replace("\0", ""))
                info.size = 12
                tar.addfile(info, io.BytesIO(b"some text.\n\n"))
        return
    with zipfile.ZipFile(archive, "w") as out:
        for name in dict.fromkeys(names):
            out.writestr(zipfile.ZipInfo(name or "x"), "some text.\n\n")


def test_a_member_that_claims_terabytes_takes_no_memory(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    pack(archive, ["big.txt"])
    member = fetch.Member(name="big.txt", size=1 << 50, start=512)
    (found,) = read_piece(piece(archive, member))
    assert isinstance(found, Fault) and found.reason == "binary"  # all to the end of the tar
    assert not fetch.inside("") and not fetch.inside(".") and not fetch.inside("a\0b")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl"])
@given(change=raw())
@examples(60)
def test_any_packed_records_are_held_out_or_named(tmp_path: Path, suffix: str, change: Any) -> None:
    text = b"".join(json.dumps({"text": prose(n)}).encode() + b"\n" for n in range(3))
    file = tmp_path / f"a{suffix}"
    if suffix.endswith("zst"):
        text = pytest.importorskip("zstandard").ZstdCompressor().compress(text)
    file.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    with bent(file, change):
        refused(lambda: from_path(file))
        refused(lambda: read_pins(file), file)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_pins_name_files_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "pins").write_text(f"{'0' * 64}  {name}\n")
    assert "leads out of the folder" in (refused(lambda: read_pins(tmp_path / "pins")) or "")


def recipes() -> Iterator[str]:
    yield from ("", "[", "sources = 3", 'include = ["../../x"]\nsources = {}\npackage = []', "\0")
    package = '[[package]]\npip = "{}"\nsha256 = "{}"\nlicence = "MIT"\nparts = []\n'
    pins = ("--evil", "a==1 --index-url=x", "-oDir=/tmp==1", "a==1\\n--pre", "a=="), ("a==1",)
    for pin, sum_ in (*((pin, "0" * 64) for pin in pins[0]), (pins[1][0], "../x")):
        yield "sources = {}\n" + package.format(pin, sum_)


@pytest.mark.parametrize("text", list(recipes()))
def test_a_recipe_of_anything_is_refused(text: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A pin goes to pip as a line of a file: it is a name and a version, and no option."""
    (tmp_path / "mine.toml").write_text(text)
    called: list[Any] = []
    monkeypatch.setattr(fetch, "_client", lambda *a: called.append(a))
    monkeypatch.setenv("JAXMOE_CACHE", str(tmp_path / "cache"))
    argv = ["build", "--tier", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]
    assert asked(main, *argv, "--workers", "1", codes=())[0] == 2
    assert not called and not (tmp_path / "out").exists()
