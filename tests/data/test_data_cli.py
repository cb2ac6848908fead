import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.config import DataConfig
from jaxmoe.data.__main__ import main


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
