"""A run of `tiny` as a user starts it, and what it leaves; what a person sees meanwhile."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Killed, finish, lines, train

from jaxmoe import config as config_lib
from jaxmoe.forecast.__main__ import main as forecast

TINY = f"{ROOT / 'configs' / 'quickstart.py'}:tiny"
LINE = re.compile(
    r"step \d+/60  \d+:\d\d left  [\d,]+ tok/s  MFU \d+%  loss \d+\.\d{3}  held-out \d+\.\d{3} b/B"
    r"( \(registered \d+\.\d{3}, [+-]\d+\.\d sigma\))?"
    r"(  final forecast \d+\.\d{3} \[\d+\.\d{3}, \d+\.\d{3}\]  registered \d+\.\d{3})?"
    r"  expert load \d\.\d\d\.\.\d+\.\d\d"
    r"(, \d+ dead)?"
)


@pytest.fixture(scope="module")
def tiny(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tiny") / "run"
    shorter = "--set=data.holdout_bytes=10000"  # a quarter of it: evals are most of the time
    stdout = finish(train(run_dir, shorter, config=TINY), text_cache)
    (run_dir.parent / "stdout").write_text(stdout)
    return run_dir


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_the_record_has_every_file_with_its_keys(tiny: Path):
    keys = {
        "metrics.jsonl": {"step", "tokens", "flops", "seconds", "train/nll", "train/grad_norm"}
        | {"moe/load", "moe/load_max", "moe/load_min", "moe/drop_rate", "train/lr"}
        | {"moe/dead_experts", "moe/layer/load_entropy", "moe/layer/router_z"}
        | {"perf/tokens_per_second", "perf/mfu", "perf/step_seconds"},
        "evals.jsonl": {"step", "tokens", "set", "set_fingerprint", "nll", "bits_per_byte"},
        "events.jsonl": {"time", "step", "what", "why"},
        "forecasts.jsonl": {"kind", "index", "previous", "target_step", "loss"},
    }
    for name, wanted in keys.items():
        rows = lines(tiny / name)
        assert rows, name
        assert all(wanted <= row.keys() for row in rows), name
    saved = read(tiny / "config.json")
    config = config_lib.from_json(json.dumps(saved["config"]))
    assert saved["fingerprint"] == config_lib.fingerprint(config)
    assert sorted(f.name for f in (tiny / "checkpoints").iterdir()) == ["40", "60"]
    assert len(read(tiny / "schedule.json")["lr"]) == 60
    assert "</html>" in (tiny / "report.html").read_text()


def test_every_step_is_there_once_with_tokens_and_flops(tiny: Path):
    rows, per_token = lines(tiny / "metrics.jsonl"), read(tiny / "environment.json")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert all(row["tokens"] == row["step"] * 8 * 32 for row in rows)
    assert all(row["flops"] == row["tokens"] * per_token["flops_per_token"] for row in rows)


def test_loss_and_held_out_bits_per_byte_fall(tiny: Path):
    losses = [row["train/nll"] for row in lines(tiny / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(320), rel=0.15)  # a uniform guess, and init's noise
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    evals = lines(tiny / "evals.jsonl")
    assert [row["step"] for row in evals] == list(range(0, 61, 5))
    bits = [row["bits_per_byte"] for row in evals]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < bits[0] - 1


def test_forecasts_come_when_due_with_intervals_and_an_outcome(tiny: Path):
    *made, outcome = lines(tiny / "forecasts.jsonl")
    assert [row["cutoff_step"] for row in made] == [30, 40, 50]
    for row in made:
        q = row["loss"]
        assert q["q05"] < q["q25"] < q["median"] < q["q75"] < q["q95"]
        assert row["path"][-1]["step"] == row["target_step"] == 60
    assert outcome["kind"] == "outcome"
    assert outcome["loss"]["realised"] == lines(tiny / "evals.jsonl")[-1]["nll"]


def test_the_register_verifies_and_every_forecast_is_scored(tiny: Path, capsys: Any):
    assert forecast(["verify", str(tiny)]) == 0
    capsys.readouterr()
    assert forecast(["score", str(tiny), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert len(scores) == 3
    assert {"inside50", "inside90", "crps"} <= scores[0].keys()


def test_compiling_and_the_first_step_are_apart(tiny: Path):
    """Both recorded and shown; the speed of step 2 holds neither."""
    seconds = read(tiny / "environment.json")
    shown = (tiny.parent / "stdout").read_text()
    assert f"compiled the step in {seconds['compile_seconds']:.1f} s" in shown
    assert f"first step {seconds['first_step_seconds']:.2f} s" in shown
    first, second = lines(tiny / "metrics.jsonl")[:2]
    assert first["perf/step_seconds"] is None
    # Intervals that do not overlap cannot add up to more than the whole.
    apart = seconds["compile_seconds"] + seconds["first_step_seconds"]
    assert 0 < second["perf/step_seconds"] <= second["seconds"] - apart


def test_plain_lines_where_stdout_is_no_terminal(tiny: Path):
    shown = (tiny.parent / "stdout").read_text()
    assert "\x1b" not in shown
    assert "\r" not in shown
    steps = [row for row in shown.splitlines() if row.startswith("step ")]
    assert len(steps) == 60
    assert all(LINE.fullmatch(row) for row in steps[1:]), steps[1]
    assert "final forecast" in steps[-1]
    assert re.search(r"done in \d+:\d\d: held-out \d\.\d{4} bits per byte", shown)
    assert f"report: {tiny / 'report.html'}" in shown


def test_on_a_terminal_a_bar_is_redrawn_in_place(killed: Killed):
    screen = killed.screen
    ups = re.findall(r"\x1b\[1A", screen)
    assert len(ups) >= 8  # the lines of the panel, drawn over
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    last = plain[plain.rindex("step 24/24 ") :]
    for words in (
        r"step 24/24 .* 100%",
        r"speed +[\d,]+ tok/s   MFU \d+%   [\d.]+ s a step",
        r"loss +\d\.\d+   \S+",
        r"gradient +norm [\d.]+   learning rate \d\.\d\de[+-]\d\d",
        r"experts +\d\.\d+\.\.\d\.\d+ of an even share .* \S+",
        r"held-out +\d\.\d+ bits per byte at step 22",
        r"expected +\d\.\d+ at that step, registered   [+-]\d+\.\d sigma",
        r"forecast +\d\.\d+ \[\d\.\d+, \d\.\d+\]   registered \d\.\d+",
        r"alarms +(none|\d+   last at step \d+, alarm)",
        r"restarts +\d   last from step (12|18)",
    ):
        assert re.search(words, last), (words, last)
    assert "resume: from checkpoint" in plain
