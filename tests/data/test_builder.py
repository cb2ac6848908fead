import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from built_sets import BYTES, build_from, texts_of

from jaxmoe.data import builder, duplicates, pieces, units
from jaxmoe.data.builder import Plan, build
from jaxmoe.data.dataset import open_data_set
from jaxmoe.data.pieces import parse_source
from jaxmoe.errors import UserError

_ROOT = Path(__file__).parents[2]


def _files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"text": f"{seed}.{i} " + "word " * rng.randrange(60), "id": f"d{i}"} for i in range(count)
    ]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def test_a_folder_of_files(tmp_path: Path):
    root = tmp_path / "my texts"
    (root / "a" / ".git").mkdir(parents=True)
    wanted = {"a/one.py": "x = 1\n" * 20, "b.txt": "caf\u00e9 <|eot|>\n", "a/c.txt.gz": "packed"}
    for name, text in wanted.items():
        data = text.encode()
        (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (root / "a" / "same.txt").write_text(wanted["b.txt"])
    (root / "empty").touch()
    (root / "a" / ".git" / "config").write_text("hidden")
    (root / ".env").write_text("hidden")
    (root / "picture").write_bytes(b"\x89PNG\0\0")
    (root / "out").symlink_to(tmp_path)
    (root / "passwd").symlink_to("/etc/passwd")
    data = build_from(tmp_path, f"mine={root},licence=MIT")
    found = texts_of(data, "mine")
    same = "b.txt" if "b.txt" in found else "a/same.txt"
    assert found == {same if k == "b.txt" else k: v for k, v in wanted.items()}
    entry = data.manifest["sources"]["mine"]
    assert (entry["domain"], entry["licence"], entry["malformed"]) == ("code", "MIT", {})
    assert entry["dropped"] == {
        "binary": 1,
        "empty": 1,
        "hidden": 1,
        "identical to another": 1,
        "link out of the folder": 1,
    }
    packages = {data.names["mine"][i].package for i in range(3)}
    assert packages <= {"a", "b"}
    assert not (tmp_path / "out.partial").exists()


def test_a_pattern_and_a_split_of_python(tmp_path: Path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    said = "What is said of it. " * 20
    (tmp_path / "src" / "a.py").write_text(f'"""{said}"""\nx = 1\n')
    (tmp_path / "src" / "deep" / "b.py").write_text("y = 2\n")
    (tmp_path / "src" / "deep" / "c.md").write_text("no")
    data = build_from(tmp_path, f"code={tmp_path}/src/**/*.py,split=said")
    assert texts_of(data, "code") == {"a.py": "x = 1\n", "deep/b.py": "y = 2\n"}
    assert texts_of(data, "said") == {"a.py": said.strip() + "\n"}
    assert data.sources["said"].domain == "prose"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record"])
@pytest.mark.parametrize("unit_bytes", [700, 1 << 24])
def test_records_of_every_format(tmp_path: Path, suffix: str, unit_bytes: int):
    rows, path = _rows(60), tmp_path / f"r.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif suffix == "array_record":
        writer = ArrayRecordWriter(str(path), "group_size:3")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
        half = len(_jsonl(rows[:30]))  # two frames, or members, cut in the middle of a line
        raw = _jsonl(rows)
        path.write_bytes(pack[suffix](raw[: half - 9]) + pack[suffix](raw[half - 9 :]))
    field = "id" if suffix == "array_record" else "text"  # another than text: JSON in the records
    data = build_from(tmp_path, f"r={path},text={field},id=id", unit_bytes=unit_bytes)
    assert list(texts_of(data, "r").values()) == [r[field] for r in rows]
    assert list(texts_of(data, "r")) == [r["id"] for r in rows]


def test_a_line_that_begins_where_a_unit_does_is_read_once(tmp_path: Path):
    lines = b"".join(b'{"text": "%03d"}\n' % i for i in range(64))
    assert len(lines) == 64 * 16
    (tmp_path / "r.jsonl").write_bytes(lines)
    for size in (16, 32, 48):
        data = build_from(tmp_path, f"r={tmp_path / 'r.jsonl'}", out=f"out{size}", unit_bytes=size)
        assert list(texts_of(data, "r").values()) == [f"{i:03d}" for i in range(64)]


def test_array_record_of_plain_text(tmp_path: Path):
    writer = ArrayRecordWriter(str(tmp_path / "r.array_record"), "group_size:1")
    for text in ("caf\u00e9".encode(), b"\xff", b"two"):
        writer.write(text)
    writer.close()
    data = build_from(tmp_path, f"r={tmp_path / 'r.array_record'}", max_malformed=0.5)
    assert texts_of(data, "r") == {"r.array_record:0": "caf\u00e9", "r.array_record:2": "two"}
    bad = data.manifest["sources"]["r"]["malformed"]
    assert bad == {"not UTF-8": {"n": 1, "example": "r.array_record:1"}}


def test_malformed_lines_are_counted_with_an_example_and_skipped(tmp_path: Path):
    good = _jsonl(_rows(50))
    bad = [b"{nope", b"[1]", b'{"body": "x"}', b'{"text": 3}', b'{"text": "\\ud800"}', b"\xff"]
    (tmp_path / "r.jsonl").write_bytes(good + b"\n".join(bad) + b'\n\n{"text": " "}\n')
    with pytest.raises(
        UserError, match=r"source r: 6 of 56 records are malformed.*0\.108"
    ) as caught:
        build_from(tmp_path, f"r={tmp_path / 'r.jsonl'}")
    assert "\n" not in str(caught.value)
    data = build_from(tmp_path, f"r={tmp_path / 'r.jsonl'}", max_malformed=0.108)
    entry = data.manifest["sources"]["r"]
    assert entry["documents"] == 50
    assert {reason: row["n"] for reason, row in entry["malformed"].items()} == {
        "not JSON": 2,
        "not a JSON object": 1,
        "no field 'text'": 1,
        "field 'text' is no string": 1,
        "not UTF-8": 1,
    }
    assert entry["malformed"]["not JSON"]["example"] == f"r.jsonl:{len(good)}"
    assert entry["dropped"] == {"empty": 1}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_cut_file_gives_what_is_left_of_it(tmp_path: Path, suffix: str):
    rng = random.Random(1)
    rows = [{"text": rng.randbytes(400).hex()} for _ in range(500)]
    packed = {"gz": gzip.compress, "zst": zstandard.compress}[suffix](_jsonl(rows))
    path = tmp_path / f"r.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    data = build_from(tmp_path, f"r={path}", max_malformed=0.5, unit_bytes=20_000)
    entry = data.manifest["sources"]["r"]
    assert 100 < entry["documents"] < 300
    assert entry["malformed"]["cut off"] == {"n": 1, "example": f"r.jsonl.{suffix}"}


def test_a_cut_parquet_file_is_malformed_and_a_wrong_column_the_users(tmp_path: Path):
    good, cut = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist(_rows(20)), good)
    cut.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(UserError, match="no column 'txt'; text=NAME, one of text, id"):
        build_from(tmp_path, f"r={good},text=txt")
    data = build_from(tmp_path, f"r={tmp_path}/*.parquet", max_malformed=0.5)
    (reason,) = data.manifest["sources"]["r"]["malformed"]
    assert reason.startswith("parquet: ")
    assert data.sources["r"].documents == 20


def test_a_damaged_array_record_loses_what_is_damaged(tmp_path: Path):
    path = tmp_path / "r.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:2")
    for i in range(1000):
        writer.write(f"text {i} ".encode() * 50)
    writer.close()
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    path.write_bytes(raw)
    data = build_from(tmp_path, f"r={path}", max_malformed=0.5)
    bad = data.manifest["sources"]["r"]["malformed"]["damaged record"]["n"]
    assert 0 < bad < 50
    assert data.sources["r"].documents == 1000 - bad
    (tmp_path / "cut.array_record").write_bytes(raw[:-1])
    data = build_from(tmp_path, f"r={tmp_path}/*.array_record", out="cut", max_malformed=0.5)
    bad = data.manifest["sources"]["r"]["malformed"]["damaged or empty ArrayRecord"]
    assert bad == {"n": 1, "example": "cut.array_record"}


def _corpus(tmp_path: Path) -> list[str]:
    for number in range(3):
        (tmp_path / f"in{number}.jsonl").write_bytes(_jsonl(_rows(80, number)))
    (tmp_path / "in3.jsonl.gz").write_bytes(gzip.compress(_jsonl(_rows(80, 1) + _rows(9, 3))))
    (tmp_path / "notes").mkdir()
    for number in range(20):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"note {number} " * number + ".")
    return [f"r={tmp_path}/in*", f"notes={tmp_path}/notes"]


def test_the_same_bytes_whatever_the_workers_and_the_units(tmp_path: Path):
    sources = _corpus(tmp_path)
    one = build_from(tmp_path, *sources, shard_bytes=4000)
    build_from(tmp_path, *sources, out="two", workers=2, unit_bytes=3000, shard_bytes=4000)
    assert len(one.manifest["sources"]["r"]["shards"]) > 3
    assert one.manifest["sources"]["r"]["dropped"] == {"identical to another": 80}
    assert _files(tmp_path / "out") == _files(tmp_path / "two")
    again = build_from(tmp_path, *sources, shard_bytes=4000)  # nothing to do
    assert again.fingerprint == one.fingerprint


_RUN = """
import sys, time
from pathlib import Path
from jaxmoe.data import builder, units
from jaxmoe.data.builder import Plan
from jaxmoe.data.pieces import parse_source
from jaxmoe.data.tokenizer import bytes_tokenizer

def report(phase, fraction):
    print(phase, fraction, flush=True)
    time.sleep(0.03 * (phase == wanted))

if __name__ == "__main__":
    wanted, folder, out, *sources = sys.argv[1:]
    plan = Plan(inputs=tuple(map(parse_source, sources)))
    builder.build(plan, bytes_tokenizer(), Path(out), Path(folder), workers=2, unit_bytes=800,
                  report=report)
"""


@pytest.mark.parametrize("phase", ["encode", "write"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path, phase: str):
    sources = _corpus(tmp_path)
    expected = build_from(tmp_path, *sources)
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(_RUN)
    command = [sys.executable, str(script), phase, str(tmp_path / "packages"), str(out), *sources]
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(phase) and float(line.split()[1]) > 0.3:
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    left = tmp_path / "killed.partial" / "units"
    kept = {p: p.stat().st_mtime_ns for p in left.glob("*.json")}
    assert len(kept) >= 10
    resumed: list[tuple[str, float]] = []
    plan = Plan(inputs=tuple(map(parse_source, sources)))
    data = build(
        plan,
        BYTES,
        out,
        tmp_path / "packages",
        workers=1,
        unit_bytes=800,
        report=lambda phase, done: resumed.append((phase, done)),
    )
    assert next(done for phase, done in resumed if phase == "encode") > 0.3  # not from nothing
    assert data.fingerprint == expected.fingerprint
    assert _files(out) == _files(tmp_path / "out")


def test_workers_end_with_a_killed_builder(tmp_path: Path):
    code = "import os, sys, time, threading; from jaxmoe.data import units\n"
    code += "units.start_worker(int(sys.argv[1])); time.sleep(60)"
    child = subprocess.Popen(  # its parent is this process, not number 1
        [sys.executable, "-c", code, "1"], env={**os.environ, "PYTHONPATH": str(_ROOT)}
    )
    assert child.wait(timeout=30) == 1


def test_a_worker_that_dies_is_said_in_one_line():
    with builder._pool(2) as run, pytest.raises(UserError, match="a worker died"):
        list(run(os._exit, [(1,)]))


def test_an_unfinished_unit_is_done_again(tmp_path: Path):
    sources = _corpus(tmp_path)
    encoder = units.Encoder(tokenizer="t.json", fingerprint="0", near=False)
    listed = pieces.list_input(parse_source(sources[1]))
    (unit,) = units.cut(listed.pieces, encoder, 1 << 20)
    (tmp_path / "t.json").write_text(BYTES.json)
    encoder = dataclasses.replace(encoder, tokenizer=str(tmp_path / "t.json"))
    units.work(unit, str(tmp_path), encoder)
    assert units.done(tmp_path, unit)
    tokens = tmp_path / f"{unit.key}.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert not units.done(tmp_path, unit)
    tokens.unlink()
    assert not units.done(tmp_path, unit)


def test_a_changed_file_or_setting_is_another_data_set(tmp_path: Path):
    sources = _corpus(tmp_path)
    before = build_from(tmp_path, *sources)
    (tmp_path / "notes" / "new.txt").write_text("a new note")
    with pytest.raises(UserError, match="built from other files or settings.*--force"):
        build_from(tmp_path, *sources)
    after = build_from(tmp_path, *sources, force=True)
    assert after.sources["notes"].documents == before.sources["notes"].documents + 1
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="it exists and is no data set"):
        build_from(tmp_path, *sources, out="other")


def test_near_duplicates_are_dropped_if_asked(tmp_path: Path):
    rng = random.Random(0)
    lexicon = [f"w{i}" for i in range(2000)]
    rows = []
    for _ in range(20):
        words = rng.choices(lexicon, k=300)
        rows.append({"text": " ".join(words)})
        words[17] = "other"
        rows.append({"text": " ".join(words)})
        rows.append({"text": " ".join(rng.choices(lexicon, k=10) + words[:100])})
    (tmp_path / "r.jsonl").write_bytes(_jsonl(rows))
    plain = build_from(tmp_path, f"r={tmp_path / 'r.jsonl'}")
    near = build_from(tmp_path, f"r={tmp_path / 'r.jsonl'}", out="near", near_duplicates=True)
    assert plain.sources["r"].documents == 60
    assert near.manifest["sources"]["r"]["dropped"] == {"nearly identical to another": 20}
    assert "r.jsonl:0" in texts_of(near, "r")


def test_near_means_four_fifths_of_a_signature():
    near = duplicates.Near()
    first = np.arange(duplicates.PERMUTATIONS, dtype=np.uint32)
    assert near.is_new(first)
    for same, new in ((8, True), (102, True), (103, False), (128, False)):  # 8: one band of 16
        other = first + np.uint32(1000 * same)
        other[:same] = first[:same]
        assert near.is_new(other) == new, same


@pytest.mark.parametrize(
    ("library", "file", "options"),
    [
        ("pyarrow.parquet", "r.parquet", {}),
        ("zstandard", "r.jsonl.zst", {}),
        ("rensa", "r.txt", {"near_duplicates": True}),
        ("array_record.python.array_record_module", "r.array_record", {}),
    ],
)
def test_a_missing_library_is_named_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, file: str, options: Any
):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / file).write_text("text")
    with pytest.raises(UserError, match="pip install "):
        build_from(tmp_path, f"r={tmp_path / file}", **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("code", "write NAME=WHERE"),
        ("co.de=x", "a name has 1 to 64"),
        ("code=/nowhere/at/all", "no such file or folder"),
        ("code=/nowhere/**/*.py", "nothing is there"),
        ("code=x,kind=zip", "kind is text, lines"),
        ("code=x.jsonl,field=body", "no option field; there are kind, text"),
    ],
)
def test_a_wrong_source_is_one_line(tmp_path: Path, source: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        build_from(tmp_path, source)
    assert "\n" not in str(caught.value)


def test_a_source_of_nothing_is_a_users_error(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"source a: no document is left \(1 binary\)"):
        build_from(tmp_path, f"a={tmp_path / 'a.txt'}")
    with pytest.raises(UserError, match="nothing to build from"):
        build_from(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="source a is given twice"):
        build_from(tmp_path, f"a={tmp_path / 'a.txt'}", f"a={tmp_path / 'a.txt'}")


def test_two_builders_of_one_folder_do_not_meet(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with builder._locked(tmp_path / "out"):
        code = _RUN.replace("workers=2", "workers=1")
        (tmp_path / "run.py").write_text(code)
        command = [sys.executable, str(tmp_path / "run.py"), "", str(tmp_path / "p")]
        run = subprocess.run(
            [*command, str(tmp_path / "out"), f"a={tmp_path / 'a.txt'}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
    assert "another process is building it" in run.stderr
    started = time.monotonic()
    assert build_from(tmp_path, f"a={tmp_path / 'a.txt'}").sources["a"].documents == 1
    assert time.monotonic() - started < 60
    data = open_data_set(tmp_path / "out", verify=True)
    assert np.array_equal(data.sources["a"].read(0, 6), [256, *b"text", 256])
