"""The registered experiments and the gates in benchmarks/records: the commands of README.md and
docs/ladder_runs.md give the figures that stand there.
"""

import json
from pathlib import Path

import pytest

from jaxmoe.forecast.__main__ import main as forecast
from jaxmoe.ladder.__main__ import main as ladder

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"


@pytest.mark.parametrize(
    ("kind", "ladder_of", "median", "came"),
    [
        ("dense", "ladder_dense", 1.1993, 1.2767),
        ("moe", "ladder_moe", 1.1473, 1.1159),
        ("muon", "gate_muon", 1.0950, 1.0758),
    ],
)
def test_a_target_is_what_was_registered_and_what_came(
    kind: str, ladder_of: str, median: float, came: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RECORDS / f"target_{kind}"
    assert forecast(["verify", str(run)]) == 0
    assert "the chain is whole and its evals agree" in capsys.readouterr().out
    assert ladder(["fit", str(RECORDS / ladder_of), "--run", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["targets"]
    assert told["loss"]["median"] == pytest.approx(median, abs=5e-5)
    assert told["realised"] == pytest.approx(came, abs=5e-5)


@pytest.mark.parametrize(
    ("change", "verdict", "code", "ratio"),
    [("muon", "keep", 0, 1.41), ("qk", "drop", 1, 0.69), ("shared", "undecided", 3, 0.93)],
)
def test_a_gate_says_what_the_table_says(
    change: str, verdict: str, code: int, ratio: float, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = RECORDS / f"gate_{change}"
    words = ["--baseline", str(RECORDS / "ladder_moe"), "--candidate", str(candidate)]
    assert ladder(["gate", *words, "--at", "1e15", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == verdict
    assert told["ratio_at_target"]["median"] == pytest.approx(ratio, abs=0.005)
