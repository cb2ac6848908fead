import gzip
import hashlib
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import prose, texts_of, write

from jaxmoe.data.__main__ import main
from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.data.heldout_sets import add_set, held_out_sets, part
from jaxmoe.data.heldout_text import Found, from_git, from_packages, from_path, read_pins
from jaxmoe.data.sources import Document
from jaxmoe.data.tokenizer import train_bpe
from jaxmoe.errors import UserError


def quiet(phase: str, done: float) -> None:
    assert 0 <= done <= 1


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """120 documents of code in 12 packages, and 30 of prose."""
    code = [(f"p{n % 12}", f"p{n % 12}/{n}.py", prose(f"code {n}", 20)) for n in range(120)]
    text = [("notes", f"notes/{n}.md", prose(f"text {n}", 20)) for n in range(30)]
    return write(tmp_path / "d", {"code": code, "text": text})


def holdout(data: DataSet, capsys: Any, name: str, *more: str) -> Any:
    assert main(["holdout", str(data.folder), name, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("which", "count"), [("--package=p3", 10), ("--document=p?/1?.py", 8), ("--share=0.2", None)]
)
def test_what_is_held_out_of_a_source_is_removed_from_it(
    data: DataSet, capsys: Any, which: str, count: int | None
):
    everything = texts_of(data, "code")
    entry = holdout(data, capsys, "part", "--source=code", which)
    after = open_data_set(data.folder, verify=True)
    held, left = texts_of(after, "part"), texts_of(after, "code")
    assert sorted(held + left) == sorted(everything)
    assert left == [t for t in everything if t not in held]
    assert entry["documents"] == len(held)
    assert len(held) == count if count else 12 <= len(held) <= 36
    assert entry["domains"]["code"]["bytes"] == sum(len(t.encode()) for t in held)
    before = data.manifest["sources"]["code"]["fingerprint"]
    assert entry["origin"]["sources"] == {"code": before}
    assert after.fingerprint != data.fingerprint
    names = [after.names["code"][n].name for n in range(len(left))]
    assert [everything[int(n[n.index("/") + 1 : -3])] for n in names] == left


def test_a_package_goes_from_every_source_that_has_it(tmp_path: Path, capsys: Any):
    """Or else its comments would be trained on; and a file's parts go together by a share too."""
    named = [(f"p{n % 9}", f"p{n % 9}/{n}.py") for n in range(90)]
    sources = {d: [(*n, prose(f"{d} {n}", 15)) for n in named] for d in ("code", "text")}
    data = write(tmp_path / "d", {**sources, "more": [("q", "q", prose("q"))]})
    assert main(["holdout", str(data.folder), "held", "--source=code", "--package=p3"]) == 2
    said = capsys.readouterr().err
    assert "package 'p3' is in source 'text' too: add --source text" in said
    entry = holdout(data, capsys, "held", "--source=*", "--package=p3")
    assert {d: row["documents"] for d, row in entry["domains"].items()} == {"code": 10, "text": 10}
    holdout(data, capsys, "part", "--source=code", "--source=te*", "--share=0.2")
    after = open_data_set(data.folder, verify=True)
    left = [
        {n.name for n in map(after.names[d].__getitem__, range(len(after.names[d])))}
        for d in ("code", "text")
    ]
    assert left[0] == left[1]
    assert 40 < len(left[0]) < 80
    assert after.sources["more"].documents == 1


def test_a_share_depends_on_names_alone(data: DataSet, tmp_path: Path, capsys: Any):
    """The same documents of a build with more of them before and between."""
    more = [("q", f"q/{n}.py", prose(f"more {n}", 20)) for n in range(50)]
    named = [data.names["code"][n] for n in range(120)]
    code = [(n.package, n.name, t) for n, t in zip(named, texts_of(data, "code"), strict=True)]
    grown = write(tmp_path / "grown", {"code": [*more, *code]})
    for one in (data, grown):
        holdout(one, capsys, "part", "--source=code", "--share=0.1")
    first, second = (set(texts_of(open_data_set(d.folder), "part")) for d in (data, grown))
    assert first == second & {t for _, _, t in code}


def test_the_fingerprint_is_of_the_text_alone(data: DataSet, tmp_path: Path, capsys: Any):
    texts = [prose(n) for n in range(9)]
    for folder, names in (("one", "abcdefghi"), ("two", "ihgfedcba")):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, texts, strict=True):
            (tmp_path / folder / f"{name}.txt").write_text(text)
    other = write(tmp_path / "e", {"code": [("p", "n", prose(1))]}, train_bpe(texts, 300))
    prints = [
        holdout(d, capsys, "held", f"--from={tmp_path / folder}")["text_fingerprint"]
        for d, folder in ((data, "one"), (other, "two"))
    ]
    assert prints[0] == prints[1]
    (tmp_path / "two" / "a.txt").write_text(texts[8] + " ")
    changed = holdout(other, capsys, "held", f"--from={tmp_path / 'two'}", "--replace")
    assert changed["text_fingerprint"] != prints[0]


def test_counts_are_by_domain_and_xz_is_of_exactly_the_text(data: DataSet, tmp_path: Path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text(prose("a"))
    (folder / "sub" / "b.md").write_text(prose("b"))
    (folder / "copy.md").write_text(prose("b"))
    (folder / "LICENSE").write_text(prose("c"))
    (folder / "noise.txt").write_bytes(b"\xff\xfe")
    add_set(data.folder, "mine", from_path(folder), quiet)
    entry = open_data_set(data.folder).manifest["heldout"]["mine"]
    assert {d: row["documents"] for d, row in entry["domains"].items()} == {"code": 1, "prose": 1}
    assert entry["bytes"] == len(prose("a")) + len(prose("b"))
    assert entry["skipped"] == {"identical to another": 1, "licence": 1, "not UTF-8": 1}
    packed = lzma.compress((prose("a") + prose("b")).encode(), preset=9)
    assert entry["xz_bits_per_byte"] == pytest.approx(8 * len(packed) / entry["bytes"])


def test_records_give_their_text(tmp_path: Path):
    def read(name: str, rows: list[Any], **more: Any) -> list[Document]:
        lines = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
        return list(from_path(tmp_path / name, **more).documents)

    problem = {"task_id": "H/0", "prompt": "def f():\n", "canonical_solution": "  return 1\n"}
    (found,) = read("human.jsonl.gz", [{**problem, "test": "assert f()"}])
    assert (found.data, found.name) == (b"def f():\n  return 1\n", "human.jsonl.gz:H/0")
    assert (found.package, found.domain) == ("human", "code")
    (found,) = read("infill.jsonl", [{**problem, "suffix": "# end"}])
    assert found.data == b"def f():\n  return 1\n# end"
    first, second = read("t.jsonl", [{"text": "one"}, "\n", {"text": "two\ud800", "id": 7}])
    assert (first.data, second.data, second.name) == (b"one", b"two?", "t.jsonl:7")
    assert read("q.jsonl", [{"q": "a", "a": "b"}], fields=("a", "q"))[0].data == b"ba"
    with pytest.raises(UserError, match="line 2 has no text in text; name .* --field: q, a"):
        read("t.jsonl", [{"text": "one"}, {"q": "a", "a": "b"}])
    found = from_path(tmp_path / "human.jsonl.gz", domain="tests")
    assert found.documents[0].domain == "tests"
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n[1]\n{"text": " "}\n')
    assert from_path(tmp_path / "bad.jsonl").skipped == {"empty": 1, "not a JSON object": 2}


def test_wikitext_is_parted_into_articles(tmp_path: Path):
    articles = [
        f" \n = {title} = \n \n {prose(title)} \n = = Section = = \n \n x \n = not one = \n y \n"
        for title in ("Robert", "A = B", "Third")
    ]
    (tmp_path / "test.txt").write_text("".join(articles))
    documents = from_path(tmp_path / "test.txt").documents
    assert len(documents) == 3
    assert [d.name.split(":")[-1] for d in documents] == ["Robert", "A = B", "Third"]
    assert b"".join(d.data for d in documents) == "".join(articles)[2:].encode()
    (tmp_path / "plain.txt").write_text("Begins\n" + articles[0])
    assert len(from_path(tmp_path / "plain.txt").documents) == 1


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *who, *command], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_a_tree_is_taken_at_its_commit(data: DataSet, tmp_path: Path, capsys: Any):
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    git(tree, "init", "-q")
    (tree / "src" / "a.py").write_text(prose("first"))
    (tree / "b.jsonl").write_text("a file of the tree, not records")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    commit = git(tree, "rev-parse", "HEAD")
    (tree / "src" / "a.py").write_text(prose("second"))
    git(tree, "commit", "-qam", "two")
    entry = holdout(data, capsys, "tree", f"--git={tree}", f"--commit={commit[:10]}")
    assert entry["origin"] == {"how": "git", "commit": commit}
    held = texts_of(open_data_set(data.folder), "tree")
    assert sorted(held) == sorted([prose("first"), "a file of the tree, not records"])
    with pytest.raises(UserError, match="git rev-parse"):
        from_git(tree, "0" * 40)


def test_pinned_files_must_be_what_they_were(data: DataSet, tmp_path: Path, capsys: Any):
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("a.py", "b.py", "not pinned.py"):
        (folder / name).write_text(prose(name))
    sums = {n: hashlib.sha256(prose(n).encode()).hexdigest() for n in ("a.py", "b.py")}
    (tmp_path / "pins").write_text("".join(f"{s}  ./{n}\n" for n, s in sums.items()))
    entry = holdout(data, capsys, "pins", f"--from={folder}", f"--pins={tmp_path / 'pins'}")
    assert entry["documents"] == 2
    (folder / "b.py").write_text(prose("b.py") + " ")
    with pytest.raises(UserError, match=f"b.py: its SHA-256 is .* {sums['b.py']} is pinned"):
        from_path(folder, pins=read_pins(tmp_path / "pins"))
    (folder / "b.py").unlink()
    with pytest.raises(UserError, match="b.py: pinned, and not there"):
        from_path(folder, pins=read_pins(tmp_path / "pins"))


def test_a_set_with_another_text_than_expected_is_not_added(data: DataSet):
    found = Found(
        documents=(Document(package="p", name="n", data=b"text", domain="prose"),),
        skipped={},
        origin={},
    )
    files = sorted(f.name for f in data.folder.iterdir())
    with pytest.raises(UserError, match=r"its text is \w{16}, not ffff"):
        add_set(data.folder, "held", found, quiet, expected="ffff")
    assert sorted(f.name for f in data.folder.iterdir() if f.name != ".lock") == files
    assert open_data_set(data.folder).manifest == data.manifest


def test_an_installed_package(data: DataSet, capsys: Any):
    entry = holdout(data, capsys, "json", "--package=json")
    assert entry["origin"] == {"how": "packages", "packages": ["json"]}
    names = open_data_set(data.folder).heldout_names["json"]
    assert "json/decoder.py" in {names[n].name for n in range(len(names))}
    with pytest.raises(UserError, match="package 'jsn' is not of this installation"):
        from_packages(["jsn"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "give one of --from"),
        (("--from=x", "--git=y"), "give one of --from"),
        (("--from=/nowhere/x",), "/nowhere/x: no such file"),
        (("--source=code",), "needs --package, --document or --share"),
        (("--source=cod", "--share=0.1"), "no source 'cod'; it has code, text"),
        (("--source=code", "--package=p99"), "code: there is no p99"),
        (("--source=code", "--document=*"), "nothing would be left"),
        (("--source=code", "--share=1.5"), "--share 1.5 is not a part"),
        (("--share=0.5", "--package=json"), "choose from a --source"),
    ],
)
def test_mistakes_of_holdout(data: DataSet, capsys: Any, more: tuple[str, ...], said: str):
    assert main(["holdout", str(data.folder), "held", *more]) == 2
    assert said in capsys.readouterr().err
    assert open_data_set(data.folder, verify=True).manifest == data.manifest


def test_names_are_unique_and_fit_for_files(data: DataSet, capsys: Any):
    holdout(data, capsys, "held", "--source=code", "--package=p1")
    for name, said in (("held", "has a held-out set 'held'; --replace"), ("a/b", "'a/b': a name")):
        assert main(["holdout", str(data.folder), name, "--source=code", "--package=p2"]) == 2
        assert said in capsys.readouterr().err
    holdout(data, capsys, "held", "--source=code", "--package=p2", "--replace")
    after = open_data_set(data.folder, verify=True)
    assert {f.name for f in data.folder.iterdir()} == {
        *after.manifest["files"],
        "manifest.json",
        ".lock",
    }
    assert after.sources["code"].documents == 100  # what was held out before does not come back


@pytest.fixture
def mixed(data: DataSet) -> DataSet:
    documents = [
        Document(package="p", name=f"{d}{n}", data=prose(f"{d}{n}", 10 + n).encode(), domain=d)
        for d, count in (("prose", 8), ("code", 24))
        for n in range(count)
    ]
    found = Found(documents=tuple(documents), skipped={}, origin={})
    add_set(data.folder, "mixed", found, quiet)
    return open_data_set(data.folder)


def test_training_gets_each_domain_as_a_stream_of_its_own(mixed: DataSet):
    (held,) = held_out_sets(mixed)
    assert list(held.domains) == ["code", "prose"]
    eot = mixed.tokenizer.eot
    for texts, count in zip(held.domains.values(), (24, 8), strict=True):
        assert len(texts.ends) == count
        assert texts.tokens[0] == eot
        assert (texts.tokens[texts.ends - 1] == eot).all()
        sizes = np.diff(texts.ends, prepend=1) - 1  # of a byte-level tokenizer: tokens are bytes
        assert (sizes == texts.sizes).all()
    joined = [held.domains[d].tokens[1:] for d in held.domains]
    assert np.concatenate([held.tokens[:1], *joined]).tolist() == held.tokens.tolist()
    assert held.bytes == sum(len(t.encode()) for t in texts_of(mixed, "mixed"))


@pytest.mark.parametrize("tokens", [1, 700, 2000])
def test_a_part_has_its_share_of_every_domain_and_another_fingerprint(mixed: DataSet, tokens: int):
    (held,) = held_out_sets(mixed)
    some = part(held, tokens)
    counts = [len(t.ends) for t in some.domains.values()]
    assert some.fingerprint == f"{held.fingerprint}/{counts[0]}+{counts[1]}"
    assert min(counts) >= 1
    for domain, whole in held.domains.items():
        mine = some.domains[domain]
        assert mine.tokens.tolist() == whole.tokens[: len(mine.tokens)].tolist()
        assert mine.ends[-1] == len(mine.tokens)
        wanted = tokens * len(whole.tokens) / len(held.tokens)
        longest = np.diff(whole.ends).max()
        assert wanted - longest - 1 <= len(mine.tokens) <= max(wanted, whole.ends[0])
    assert some.bytes == sum(len(t.tokens) - 1 - len(t.ends) for t in some.domains.values())
    assert len(some.tokens) == 1 + sum(len(t.tokens) - 1 for t in some.domains.values())
    assert part(held, len(held.tokens)) is held
