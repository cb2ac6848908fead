"""`python -m jaxmoe.convert` as a person and as a script see it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from folders import SMALL, draw, write
from processes import ROOT, environment

from jaxmoe.convert.__main__ import main


def convert(text_cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxmoe.convert", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(text_cache), capture_output=True, text=True
    )


def test_a_real_process_says_one_line_each_way(
    tmp_path: Path, text_cache: Path, straight: Path
) -> None:
    done = convert(text_cache, "to-hf", str(straight), "--to", str(tmp_path / "hf"))
    assert done.returncode == 0 and done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert f"{straight / 'checkpoints' / '24'} -> {tmp_path / 'hf'}: qwen3_moe, " in line
    assert " tensors, " in line and " GB in " in line
    again = convert(text_cache, "to-hf", str(straight), "--to", str(tmp_path / "hf"))
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr == (
        f"jaxmoe.convert: --to {tmp_path / 'hf'}: it exists already; give another folder or"
        " remove it\n"
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_json_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = draw(SMALL[name])
    theirs, ours, back = (str(tmp_path / n) for n in ("theirs", "ours", "back"))
    write(tmp_path / "theirs", SMALL[name], tensors)
    size = sum(t.nbytes for t in tensors.values())
    for command in (["from-hf", theirs, "--to", ours], ["to-hf", ours, "--to", back]):
        assert main([*command, "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.count("\n") == 1
        result = json.loads(out)
        assert result["from"] == command[1] and result["to"] == command[3]
        assert result["model_type"] == name
        assert result["tensors"] == len(tensors) and result["bytes"] == size
        assert 0 < result["seconds"] < 60
        if command[0] == "from-hf":
            assert result["params"] == sum(t.size for t in tensors.values())


def test_errors_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["from-hf", str(tmp_path), "--to", str(tmp_path / "x"), "--json"],):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("jaxmoe.convert: ") and err.count("\n") == 1
        assert str(tmp_path / "config.json") in err


@pytest.mark.parametrize(
    "command",
    [[], ["from-hf"], ["from-hf", "a"], ["to-hf", "a", "--to", "b", "--dtype", "float16"]],
)
def test_usage_errors_exit_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(command)
    assert error.value.code == 2
    assert "usage: python -m jaxmoe.convert" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for part in ("from-hf Mixtral-8x7B-v0.1 --to mixtral", "to-hf runs/", "checkpoint.init_from="):
        assert part in text


def test_a_shard_limit_must_be_positive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: Path
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["to-hf", str(straight), "--to", str(tmp_path / "x"), "--shard-bytes", "0"])
    assert error.value.code == 2 and "--shard-bytes" in capsys.readouterr().err
