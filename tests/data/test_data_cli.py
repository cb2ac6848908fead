import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmoe.config import DataConfig, apply_sets, as_dict, load, replace
from jaxmoe.data import feed
from jaxmoe.data.__main__ import main
from jaxmoe.data.cache import prepare
from jaxmoe.data.loader import Stream
from jaxmoe.data.mixture import Mixture

_SMALL = ["--set=model.loss_chunk=8"]


def _sets(config: DataConfig) -> list[str]:
    pairs = {"path": config.path, "cache": config.cache, "tokenizer": "bytes", "holdout": "('p3',)"}
    return [f"--set=data.{key}={value}" for key, value in pairs.items()]


def test_build_then_inspect(config: DataConfig, capsys: Any):
    assert main(["build", *_sets(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["held_out"] == ["p3"]
    assert summary["train_documents"] == 69
    assert summary["train_bytes_per_token"] < 1  # an end of text a document, and a byte a token
    assert main(["build", *_sets(config), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "p3" in shown
    assert "69" in shown
    assert main(["inspect", *_sets(config), "--position", "5", "--rows", "2", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)
    assert [s["position"] for s in samples] == [5, 6]
    assert main(["inspect", *_sets(config), "--position", "6"]) == 0
    assert samples[1]["text"] in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["data.path=/nowhere/at/all", "data.pth=x", "data.holdout=('q',)"])
def test_a_mistake_is_one_line_and_exit_code_2(config: DataConfig, capsys: Any, bad: str):
    assert main(["build", *_sets(config), f"--set={bad}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert bad.split("=")[0].split(".")[1] in lines[-1]


def test_as_a_module_from_anywhere(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "jaxmoe.data", "build", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "python -m jaxmoe.data build" in run.stdout


def test_building_needs_no_jax():
    code = (
        "import sys, jaxmoe.data.cache, jaxmoe.data.loader, jaxmoe.data.__main__;"
        "print({'jax', 'grain', 'tokenizers'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "set()\n"


def inspected(capsys: Any, *args: str) -> Any:
    assert main(["inspect", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_is_told_by_its_documents(config: DataConfig, capsys: Any, tmp_path: Path):
    """Those of the plain stream, by source; their text is that of the tokens at their places."""
    sets = [*_sets(config), "--set=train.batch_size=3", "--set=train.seq_len=64", *_SMALL]
    step = inspected(capsys, *sets, "--step", "5")
    assert (step["step"], step["tokens"], step["batch_size"]) == (5, 4 * 3 * 64, 3)
    corpus = prepare(replace(config, holdout=("p3",)), 4096)
    ends = np.fromfile(corpus.folder / "train.ends.bin", "<i8")
    stream = Stream(corpus.train, 64, 0)
    for row, sequence in enumerate(step["sequences"]):
        assert sequence["position"] == 12 + row
        assert sequence["text"] == corpus.tokenizer.decode(stream[12 + row][:-1])
        said = []
        for document in sequence["documents"]:
            start = ends[document["document"] - 1] if document["document"] else 1
            first, last = document["tokens"]
            about = corpus.names["train"][document["document"]]
            assert (document["package"], document["name"]) == (about.package, about.name)
            assert start + document["of"] == ends[document["document"]]
            said += corpus.train[start + first : start + last].tolist()
        assert said == stream[12 + row][:-1].tolist()
    assert main(["inspect", *sets, "--step", "5"]) == 0
    shown = capsys.readouterr().out
    assert "step 5: 3 x 64 tokens, after 768 of the run" in shown
    assert "train: 3 sequences, 100.0%" in shown


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_step_of_a_mix_is_told_by_source(config: DataConfig, capsys: Any, packing: str):
    """Of what the run reads at that step, and of no other; from the run's folder too."""
    mix = "[{'name': 'train', 'weight': 2.0}]"
    ramp = "[{'tokens': 0, 'seq_len': 32}, {'tokens': 500, 'seq_len': 64}]"
    sets = [*_sets(config), f"--set=data.sources={mix}", f"--set=train.length_ramp={ramp}", *_SMALL]
    sets += [f"--set=data.packing={packing}", "--set=train.batch_size=3", "--set=train.seq_len=64"]
    whole = apply_sets(load("configs/quickstart.py"), [s.removeprefix("--set=") for s in sets])
    corpus = prepare(whole.data, 4096)
    stream = feed.open_stream(whole, corpus)
    assert isinstance(stream, Mixture)
    for number in (1, 3, 4):
        step = inspected(capsys, *sets, "--step", str(number))
        rows = stream.rows(number - 1, 0, step["batch_size"])
        assert (step["batch_size"], step["seq_len"]) == ((6, 32) if number < 4 else (3, 64))
        texts = [corpus.tokenizer.decode(row[:-1]) for row in rows.tokens]
        assert [one["text"] for one in step["sequences"]] == texts
        for one in step["sequences"]:
            sizes = [last - first for first, last in (d["tokens"] for d in one["documents"])]
            assert sum(sizes) == step["seq_len"]


def test_steps_that_are_not_there_and_folders_that_are_no_run(
    config: DataConfig, capsys: Any, tmp_path: Path
):
    assert main(["inspect", *_sets(config), "--step", "701"]) == 2
    assert "--step 701: the run has steps 1 to 700" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--step", "1"]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path), "--step", "1"]) == 2
    assert "config.json: not a run's config" in capsys.readouterr().err
    run = {"config": as_dict(replace(load("configs/quickstart.py"), data=config))}
    (tmp_path / "config.json").write_text(json.dumps(run))
    (tmp_path / "environment.json").write_text('{"data": {"fingerprint": "other"}}')
    assert main(["inspect", str(tmp_path), "--step", "1"]) == 2
    assert "was trained on other data (other)" in capsys.readouterr().err
    (tmp_path / "environment.json").unlink()
    here = inspected(capsys, str(tmp_path), "--step", "2", "--rows", "2")
    there = inspected(capsys, *_sets(config), "--set=data.holdout=()", "--step", "2", "--rows", "2")
    assert here == there
