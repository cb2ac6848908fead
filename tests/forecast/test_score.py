"""Scores by hand, and laws of scoring."""

import numpy as np
import pytest
from forecast_cases import outcome, record
from scipy.special import ndtr, ndtri

from jaxmoe.errors import UserError
from jaxmoe.forecast.score import quantile, score, summarise


def register_of(*records: dict) -> list[dict]:
    return [{**r, "index": i} for i, r in enumerate(records)]


def crps_by_integral(realised: float) -> float:
    """The integral of (F(x) - [x >= realised])^2, F Gaussian between 2.9, 3, 3.1, 3.2, 3.3."""
    z = ndtri([0.05, 0.25, 0.5, 0.75, 0.95])
    loss = np.array([2.9, 3.0, 3.1, 3.2, 3.3])
    x = np.linspace(1.5, 5, 200001)
    inner = np.interp(x, loss, z)
    first, last = (z[1] - z[0]) / 0.1, (z[-1] - z[-2]) / 0.1
    inner = np.where(x < 2.9, z[0] + first * (x - 2.9), inner)
    inner = np.where(x > 3.3, z[-1] + last * (x - 3.3), inner)
    return float(np.trapezoid((ndtr(inner) - (x >= realised)) ** 2, x))


def test_one_forecast_by_hand() -> None:
    (one,) = score(register_of(record(300), outcome(3.25)))
    assert (one.seen, one.realised, one.median) == (0.3, 3.25, 3.1)
    assert one.error == pytest.approx(-0.15 / 3.25)
    assert not one.inside50 and one.inside90
    assert one.width50 == pytest.approx(0.2 / 3.25)
    assert one.width90 == pytest.approx(0.4 / 3.25)
    # 0.05*0.35, 0.25*0.25, 0.5*0.15, 0.75*0.05, (0.95-1)*(3.25-3.3)
    losses = np.array([0.0175, 0.0625, 0.075, 0.0375, 0.0025])
    assert one.pinball == pytest.approx(losses.mean())
    assert one.crps == pytest.approx(crps_by_integral(3.25), rel=0.005)


@pytest.mark.parametrize(
    ("realised", "in50", "in90"),
    [(2.89, False, False), (2.9, False, True), (3.0, True, True), (3.2, True, True)]
    + [(3.3, False, True), (3.31, False, False)],
)
def test_interval_ends_belong_to_it(realised: float, in50: bool, in90: bool) -> None:
    (one,) = score(register_of(record(), outcome(realised)))
    assert (one.inside50, one.inside90) == (in50, in90)


def test_crps_of_a_normal_is_near_its_closed_form() -> None:
    z = np.array([-1.6449, -0.6745, 0, 0.6745, 1.6449])
    names = ("q05", "q25", "median", "q75", "q95")
    loss = {n: 3 + 0.1 * float(v) for n, v in zip(names, z, strict=True)}
    came = 3 + 0.1 * np.random.default_rng(0).standard_normal(2000)
    scores = [score(register_of(record(loss=loss), outcome(float(y))))[0].crps for y in came]
    assert np.mean(scores) == pytest.approx(0.1 / np.sqrt(np.pi), rel=0.03)


def test_a_sharper_right_forecast_scores_better() -> None:
    sharp = {"q05": 3.02, "q25": 3.04, "median": 3.05, "q75": 3.06, "q95": 3.08}
    wide, narrow = score(register_of(record(), record(loss=sharp), outcome(3.05)))
    assert narrow.crps < wide.crps and narrow.pinball < wide.pinball


def test_summary_by_lead() -> None:
    scores = score(register_of(record(200), record(240), record(900), outcome(3.25)))
    early, late = summarise(scores)
    assert (early.count, late.count) == (2, 1)
    assert (early.low, early.high, late.low, late.high) == (0.15, 0.25, 0.8, 1.0)
    assert (early.coverage50, early.coverage90) == (0.0, 1.0)
    assert early.absolute_error == -early.error == pytest.approx(0.15 / 3.25)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="no outcome"):
        score(register_of(record()))
    with pytest.raises(UserError, match="target_step=500"):
        score(register_of(record(target_step=500), outcome()))
    with pytest.raises(UserError, match="set_fingerprint='other'"):
        score(register_of(record(set_fingerprint="other"), outcome()))


def gaussian(sd: float, names: list[str]) -> dict[str, float]:
    levels = [0.5 if n == "median" else float(n[1:]) / 100 for n in names]
    return {n: 3.0 + sd * float(ndtri(q)) for n, q in zip(names, levels, strict=True)}


OLD = ["q05", "q25", "median", "q75", "q95"]


def test_the_interval_of_80_percent_is_read_between_its_neighbours() -> None:
    """Of a Gaussian exactly; where q10 and q90 were registered, theirs is taken."""
    z = float(ndtri(0.9))
    for off, inside in ((z - 0.01, True), (z + 0.01, False)):
        one = score(register_of(record(loss=gaussian(0.1, OLD)), outcome(3 + 0.1 * off)))[0]
        assert one.inside80 is inside
        assert one.width80 * one.realised == pytest.approx(0.2 * z)
    skewed = {**gaussian(0.1, OLD), "q10": 2.86, "q90": 3.16}
    one = score(register_of(record(loss=skewed), outcome(3.0)))[0]
    assert one.width80 == pytest.approx(0.3 / 3)
    assert quantile(skewed, np.array([0.1, 0.9])).tolist() == [2.86, 3.16]


def test_pit_of_a_calibrated_forecast_is_uniform() -> None:
    for q in (0.02, 0.1, 0.4, 0.77, 0.99):
        came = outcome(3 + 0.1 * float(ndtri(q)))
        one = score(register_of(record(loss=gaussian(0.1, OLD)), came))[0]
        assert one.pit == pytest.approx(q, abs=0.006)
    certain = dict.fromkeys(OLD, 3.0)
    pits = [score(register_of(record(loss=certain), outcome(y)))[0].pit for y in (2.9, 3.0, 3.1)]
    assert pits == [0.0, 0.5, 1.0]
    assert score(register_of(record(loss=certain), outcome(3.0)))[0].crps == 0.0


def test_a_forecast_from_before_the_start_has_a_row_of_its_own() -> None:
    early, first = record(300, cutoff_step=0, cutoff_tokens=0.0), record(20)
    scores = score(register_of(early, first, outcome(3.05)))
    rows = summarise(scores, runs=["a", "b"])
    assert [(r.low, r.count) for r in rows] == [(0.0, 1), (1e-9, 1)]
    (both,) = summarise(scores, (0.0, 1.0), runs=["a", "b"])
    assert (both.runs, both.count, both.coverage80) == (2, 2, 1.0)
    assert both.pinball == pytest.approx(np.mean([s.pinball for s in scores]))
    assert summarise(scores, (0.0, 1.0))[0].runs == 1
