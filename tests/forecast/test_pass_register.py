"""Pass rates in a register of their own: forecast without the target's counts, then scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.forecast.__main__ import main
from jaxmoe.forecast.pass_register import (
    PASS_RATES,
    read_counts,
    register_outcome,
    register_passes,
    score_passes,
)
from jaxmoe.forecast.register import anchor_path, read, verify

FLOPS = [1e18, 4e18, 1.6e19, 6.4e19, 2.56e20]
TARGET = 5e21
BUCKETS = {"easy": 0.6, "hard": 2.0}  # -E[log p] at 1e19 FLOPs


def counted(flops: float, seed: int = 0) -> list[dict[str, Any]]:
    """-E[log p] = scale (C / 1e19)^-0.25, tasks about it."""
    rng = np.random.default_rng([seed, int(np.log(flops) * 100)])
    rows = []
    for bucket, scale in BUCKETS.items():
        p = np.exp(-scale * (flops / 1e19) ** -0.25 * rng.gamma(8.0, 1 / 8.0, 30))
        for task, rate in enumerate(p):
            passes = int(rng.binomial(100, rate))
            name = f"{bucket}{task}"
            rows.append({"compute": flops, "bucket": bucket, "task": name, "passes": passes})
    return [{**row, "tries": 100} for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    return write(tmp_path / "counts.jsonl", [row for c in FLOPS for row in counted(c)])


def test_a_forecast_is_registered_and_scored(counts: Path, tmp_path: Path) -> None:
    found = read_counts(counts)
    shuffled = counts.read_text().splitlines()[::-1]
    write(counts, [json.loads(line) for line in shuffled])
    assert read_counts(counts).sha256 == found.sha256
    register_passes(found, TARGET, tmp_path)
    outcome = read_counts(write(tmp_path / "own.jsonl", counted(TARGET)))
    register_outcome(outcome, tmp_path)
    path = tmp_path / PASS_RATES
    assert verify(path) == []
    scores = score_passes(read(path))
    assert [one.bucket for one in scores] == ["easy", "hard"]
    for one in scores:
        own = [row for row in counted(TARGET) if row["bucket"] == one.bucket]
        plain = -np.mean([np.log(row["passes"] / row["tries"]) for row in own])
        assert one.realised == pytest.approx(plain, rel=0.15)  # 5 to 10 % of it is shrinkage
        assert one.inside90 and abs(one.error) < 0.5
    with pytest.raises(UserError, match="closed by the outcome"):
        register_passes(found, 2 * TARGET, tmp_path)


def test_coverage_over_many_draws(tmp_path: Path) -> None:
    inside = []
    for seed in range(10):
        rows = [row for c in FLOPS for row in counted(c, seed)]
        run = tmp_path / str(seed)
        register_passes(read_counts(write(tmp_path / "c.jsonl", rows)), TARGET, run)
        own = read_counts(write(tmp_path / "own.jsonl", counted(TARGET, seed)))
        register_outcome(own, run)
        inside += [one.inside90 for one in score_passes(read(run / PASS_RATES))]
    assert np.mean(inside) >= 0.7  # of 20; P(under 14 at 90 %) < 0.001


def test_every_field_of_a_pass_register_is_guarded(counts: Path, tmp_path: Path) -> None:
    register_passes(read_counts(counts), TARGET, tmp_path)
    register_passes(read_counts(counts), 2 * TARGET, tmp_path)
    register_outcome(read_counts(write(tmp_path / "own.jsonl", counted(TARGET))), tmp_path)
    path = tmp_path / PASS_RATES
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines):
        fields = json.loads(line)
        for name in fields:
            for changed in ({**fields, name: "x"}, {k: v for k, v in fields.items() if k != name}):
                forged = [*lines]
                forged[number] = json.dumps(changed, separators=(",", ":")).encode()
                path.write_bytes(b"".join(one + b"\n" for one in forged))
                assert verify(path), (number, name)
        path.write_bytes(b"".join(one + b"\n" for one in lines if one != line))
        assert verify(path), number
    path.write_bytes(b"".join(one + b"\n" for one in lines))
    assert verify(path) == [] and anchor_path(path).exists()


def test_the_targets_own_counts_are_look_ahead(counts: Path, tmp_path: Path) -> None:
    write(counts, [row for c in (*FLOPS, TARGET) for row in counted(c)])
    for flops in (TARGET, TARGET / 10, TARGET * (1 + 1e-9)):
        with pytest.raises(UserError, match="without its own counts"):
            register_passes(read_counts(counts), flops, tmp_path)
    assert not (tmp_path / PASS_RATES).exists()


def test_an_outcome_is_of_what_was_forecast(counts: Path, tmp_path: Path) -> None:
    register_passes(read_counts(counts), TARGET, tmp_path)
    with pytest.raises(UserError, match="counts of 5 models"):
        register_outcome(read_counts(counts), tmp_path)
    with pytest.raises(UserError, match="no forecast at 1e\\+22 FLOPs \\(there is: 5e\\+21\\)"):
        register_outcome(read_counts(write(tmp_path / "o", counted(1e22))), tmp_path)
    fewer = counted(TARGET)[1:]
    with pytest.raises(UserError, match="of other tasks or buckets"):
        register_outcome(read_counts(write(tmp_path / "o", fewer)), tmp_path)
    with pytest.raises(UserError, match="no outcome of the pass rates"):
        score_passes(read(tmp_path / PASS_RATES))


BAD = {
    "line 1: .*tries": {"tries": None},
    "passes=101 of tries=100": {"passes": 101},
    "passes=1.5": {"passes": 1.5},
    "compute=-1": {"compute": -1},
    "is not tried by the models of both": {"task": "another"},
    "is there twice": {"task": "easy1"},
}


@pytest.mark.parametrize("message", BAD)
def test_damaged_counts_are_named(counts: Path, message: str) -> None:
    first, *rest = [json.loads(line) for line in counts.read_text().splitlines()]
    first = {k: v for k, v in {**first, **BAD[message]}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        read_counts(write(counts, [first, *rest]))


def test_by_command(counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run-dir", str(tmp_path / "run")]
    command = ["passes", str(counts), "--flops", str(TARGET), *run]
    assert main([*command, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["kind"] == "pass rates" and set(line["buckets"]) == set(BUCKETS)
    assert main(command) == 2
    assert "--correct REASON" in capsys.readouterr().err
    assert main([*command, "--correct", "a task was wrong"]) == 0
    own = str(write(tmp_path / "own.jsonl", counted(TARGET)))
    assert main(["passes", own, "--outcome", *run]) == 0
    assert "in 90 %" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "3 lines" in capsys.readouterr().out
    path = tmp_path / "run" / PASS_RATES
    path.write_bytes(path.read_bytes().replace(b"a task", b"b task"))
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert "pass_rates.jsonl: line 3" in capsys.readouterr().out
