"""Scores by hand, and laws of scoring."""

import numpy as np
import pytest
from forecast_cases import outcome, record

from jaxmoe.errors import UserError
from jaxmoe.forecast.score import score, summarise


def register_of(*records: dict) -> list[dict]:
    return [{**r, "index": i} for i, r in enumerate(records)]


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
    assert one.crps == pytest.approx(2 * losses @ [0.15, 0.225, 0.25, 0.225, 0.15])


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
    assert np.mean(scores) == pytest.approx(0.1 / np.sqrt(np.pi), rel=0.08)


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
