"""Finished runs: counts that do not overflow, missing values, repeated tokens, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.forecast import Points, Stack, read_points
from jaxmoe.forecast.points import refuse_thin


def test_flops_of_a_large_run_do_not_overflow() -> None:
    """6 * 1e12 * 3e13 is 1.8e26: as int64 it wraps round to a wrong number without a word."""
    n, d = np.array([10**12], np.int64), np.array([3 * 10**13], np.int64)
    with np.errstate(over="ignore"):
        assert int((6 * n * d)[0]) != 6 * 10**12 * 3 * 10**13  # the trap is real
    points = Points.of(n, d, [2.0])
    assert points.flops[0] == pytest.approx(1.8e26, rel=1e-12)
    assert points.flops.dtype == np.float64


def test_incomplete_rows_are_dropped_and_counted() -> None:
    nan = float("nan")
    points = Points.of([1e8, nan, 1e8, 1e8], [1e9, 1e9, nan, 1e9], [3.0, 3.0, 3.0, float("inf")])
    assert len(points) == 1
    assert points.dropped == 3


def test_a_target_has_no_loss_and_is_kept() -> None:
    assert len(Points.of([1e9, 2e9], [2e10, 4e10])) == 2


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_count_that_is_not_above_0_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match="tokens="):
        Points.of([1e8], [bad], [3.0])


def test_effective_tokens() -> None:
    """Muennighoff et al.: once is itself; four epochs nearly 4; the limit is 1 + R* = 16.39."""
    d = np.array([1.0, 4.0, 1e6]) * 1e9
    points = Points.of([1e8] * 3, d, [3.0] * 3, unique_tokens=[1e9] * 3)
    once, four, many = points.effective_tokens / 1e9
    assert once == 1.0
    assert four == pytest.approx(1 + 15.39 * (1 - np.exp(-3 / 15.39)), rel=1e-12)
    assert 3.6 < four < 3.8
    assert many == pytest.approx(16.39, rel=1e-6)


def test_refusals_name_the_reason() -> None:
    n = np.array([1e8, 1e8 * 1.001, 2e8, 4e8])
    with pytest.raises(UserError, match="3 distinct compute budgets"):
        refuse_thin(Points.of(n, 20 * n, [3.5, 3.5, 3.2, 3.0]))  # a rerun is no budget of its own
    n = np.array([1.0, 1.1, 1.2, 1.3]) * 1e8
    with pytest.raises(UserError, match="span 0.23 decades"):
        Stack().fit(Points.of(n, 20 * n, [3.5, 3.4, 3.3, 3.2]))
    n = np.array([1.0, 1.4, 1.8, 2.2]) * 1e8
    refuse_thin(Points.of(n, 20 * n, [3.5, 3.4, 3.3, 3.2]))


def test_csv_and_json_lines_agree(tmp_path: Path) -> None:
    rows = [
        {"params_active": 1e8, "tokens": 2e9, "loss": 3.5, "router": "hash", "note": "x"},
        {"params_active": 2e8, "tokens": 4e9, "loss": None, "router": "", "note": "y"},
        {"params_active": 3e8, "tokens": 6e9, "loss": 3.1, "router": "top", "note": ""},
    ]
    lines = tmp_path / "runs.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = tmp_path / "runs.csv"
    cells = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
    table.write_text("\n".join([",".join(rows[0]), *cells]))
    one, two = read_points([lines]), read_points([table])
    assert one.dropped == two.dropped == 1
    assert one.loss.tolist() == two.loss.tolist() == [3.5, 3.1]
    assert two.router.tolist() == ["hash", "top"]
    assert len(read_points([lines, table])) == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("params_active,tokens\n1,2\n", "no loss"),
        ("params_active,tokens,loss\n1,two,3\n", "tokens='two' is not a number"),
        ('{"tokens": 1}\n{"tok', "line 2 is not JSON"),
        ("", "no runs"),
    ],
)
def test_malformed_records_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        read_points([path])
