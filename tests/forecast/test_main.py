"""The command line: exit codes, one-line errors, JSON, and the same forecast as the hook's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forecast_cases import record, synthetic

from jaxmoe.forecast import forecast_final
from jaxmoe.forecast.__main__ import main
from jaxmoe.forecast.register import append


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory with two forecasts made by the hook's function and its outcome."""
    run, _ = synthetic(21)
    base = {"set": "stdlib", "set_fingerprint": "f00", "bits_per_byte": 1.0}
    rows = [
        {"step": int(s), "tokens": int(s) * 2048, "nll": float(v), **base}
        for s, v in zip(run.steps, run.loss, strict=True)
    ]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"name": "tiny"}))
    plan = {"lr": list(run.schedule.lr), "tokens_per_step": 2048}
    (tmp_path / "schedule.json").write_text(json.dumps(plan))
    where: dict[str, Any] = {"config": "abc", "set": "stdlib", "set_fingerprint": "f00"}
    where |= {"train_fingerprint": "7ea", "leaking": 0}
    for step in (300, 600):
        forecast = forecast_final(run.until(step))
        append(tmp_path / "forecasts.jsonl", forecast.record(**where, evals_lines=step // 25))
    last = {"target_step": 1000, "target_tokens": 2048000.0}
    end = {"kind": "outcome", **where, **last, "loss": {"realised": float(run.loss[-1])}}
    append(tmp_path / "forecasts.jsonl", end)
    return tmp_path


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "3 lines, the chain is whole and its evals agree" in capsys.readouterr().out
    evals = folder / "evals.jsonl"
    evals.write_text(evals.read_text().replace('"step": 25,', '"step": 24,'))
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "line 1: evals.jsonl up to step 300" in out and "line 2: evals.jsonl" in out
    assert main(["verify", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and [p["line"] for p in found["problems"]] == [1, 2]


def test_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["seen"] for s in found["scores"]] == [0.3, 0.6]
    assert abs(found["scores"][1]["error"]) < 0.03
    assert main(["score", str(folder)]) == 0
    assert "by lead" in capsys.readouterr().out
    picture = folder / "scores.html"
    assert main(["score", str(folder), "--json", "--picture", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["count"] == 2
    assert "forecast over outcome" in picture.read_text()


def test_fit_equals_the_hook(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = synthetic(21)
    assert main(["fit", str(folder), "--at", "600", "--json"]) == 0
    assert capsys.readouterr().out.strip() == forecast_final(run.until(600)).json()
    assert main(["fit", str(folder), "--at", "600"]) == 0
    out = capsys.readouterr().out
    assert "tiny: held-out loss at step 1000" in out and "final loss" in out


MISTAKES = {
    "no run": (["verify", "{}/nowhere"], "no such run directory"),
    "no register": (["verify", "{}/empty"], "no such file"),
    "ended": (["fit", "{}"], "is not after the last eval"),
    "early": (["fit", "{}", "--at", "60"], "wait for 3"),
    "set": (["fit", "{}", "--eval-set", "x"], "evals.jsonl has stdlib"),
    "no outcome": (["score", "{}/open"], "no outcome"),
    "picture": (["score", "{}", "--picture", "{}/scores.gif"], "end it in .svg, .png, .html"),
    "no folder": (["score", "{}", "--picture", "{}/none/scores.svg"], "no such folder"),
    "benchmark": (["score", "--benchmark", "--data", "{}", "--picture", "a.svg"], "no --picture"),
    "no config": (["fit", "{}/open"], "config.json: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(
    mistake: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    append(folder / "open" / "forecasts.jsonl", record())
    argv, message = MISTAKES[mistake]
    assert main([part.format(folder) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("text", ["", "[]", '{"lr": 3}', '{"lr": [1, 0.5]}'])
def test_a_bad_schedule_file(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "schedule.json").write_text(text)
    assert main(["fit", str(folder)]) == 2
    assert "schedule" in capsys.readouterr().err


def test_a_damaged_register_is_not_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "forecasts.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1', 1))
    assert main(["score", str(folder)]) == 2
    assert "damaged register: line 2" in capsys.readouterr().err


def test_as_a_module_without_jax(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['x', 'verify', sys.argv[1]]\n"
        "from jaxmoe.forecast.__main__ import main\n"
        "code = main()\nassert 'jax' not in sys.modules, 'jax was imported'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "jaxmoe.forecast", "--help"]
    helped = subprocess.run(command, capture_output=True, text=True)
    assert helped.returncode == 0 and "examples:" in helped.stdout
