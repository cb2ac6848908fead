"""Schedules: recovery of a law's own truth, prediction of others, no look-ahead, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from forecast_cases import rates, synthetic

from jaxmoe.errors import UserError
from jaxmoe.forecast import Run, Schedule
from jaxmoe.forecast.anneal import KERNELS, AnnealLaw, AnnealStack, predict_mean


def lagged(kind: str, steps: int = 2000) -> Run:
    """A run of the lag law itself: c 2, A 0.3, alpha 0.5, B 0.05, tau 0.03 of 2000 steps."""
    lr = rates(kind, steps=steps, final=0.1)
    schedule = Schedule.of(lr)
    fall = -np.diff(schedule.annealing, prepend=1.0)
    gain = np.zeros(steps)
    for at in np.flatnonzero(fall):
        gain[at:] += fall[at] * -np.expm1(-(np.arange(steps - at)) / 60.0)
    loss = (2.0 + 0.3 * (np.cumsum(schedule.lr) / 2000) ** -0.5) * (1 - 0.05 * gain)
    at = np.arange(100, steps + 1, 20)
    return Run(schedule=schedule, steps=at, loss=loss[at - 1], name=kind)


def test_the_lag_law_finds_its_own_parameters() -> None:
    fit = AnnealLaw(kernel="lag").fit([lagged("cosine"), lagged("constant"), lagged("wsd")])
    alpha, drop, tau = fit.shape[0], np.exp(fit.shape[1]), np.exp(fit.shape[2])
    assert fit.terms == pytest.approx([2.0, 0.3], rel=0.02)
    assert alpha == pytest.approx(0.5, rel=0.02)
    assert drop == pytest.approx(0.05, rel=0.02)
    assert tau == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_longer_schedule_is_predicted(kernel: str) -> None:
    """Twice the steps, another shape, from two short runs: within 0.5 % at the end."""
    fit = AnnealLaw(kernel=kernel).fit([lagged("cosine"), lagged("constant")])
    longer = lagged("wsd", steps=4000)
    predicted = fit.predict(longer, longer.steps)
    assert predicted[-1] == pytest.approx(longer.loss[-1], rel=0.005)
    assert np.mean(np.abs(predicted / longer.loss - 1)) < 0.003


def test_the_targets_own_losses_are_not_read() -> None:
    fits = AnnealStack().fit([lagged("cosine"), lagged("constant")])
    target = lagged("wsd")
    spoilt = replace(target, loss=target.loss + 5.0)
    assert np.array_equal(
        predict_mean(fits, target, target.steps), predict_mean(fits, spoilt, target.steps)
    )


def test_another_truth_than_the_laws() -> None:
    """Runs of `forecast_cases`, with a drift and noise no kernel has: within 2 % at the end."""
    runs = [synthetic(3, kind, noise=0.001)[0] for kind in ("cosine", "constant")]
    target, final = synthetic(3, "wsd", noise=0.001)
    fits = AnnealStack().fit(runs)
    assert predict_mean(fits, target, [1000])[0] == pytest.approx(final, rel=0.02)


def test_a_lone_constant_run_has_no_drops() -> None:
    fit = AnnealLaw().fit([lagged("constant")])
    assert np.isfinite(fit.predict(lagged("cosine"), [1000, 2000])).all()


def test_draws_widen_beyond_what_was_fitted() -> None:
    fit = AnnealLaw().fit([lagged("cosine"), lagged("constant")])
    longer = lagged("constant", steps=20000)
    drawn = fit.sample(longer, [1000, 20000], n=4000, rng=np.random.default_rng(0))
    near, far = drawn.std(0) / drawn.mean(0)
    assert far > 3 * near


def test_refusals_of_the_annealing_law() -> None:
    with pytest.raises(UserError, match="kernel='cubic'"):
        AnnealLaw(kernel="cubic").fit([lagged("cosine")])
    with pytest.raises(UserError, match="0 held-out losses"):
        AnnealLaw().fit([])
    with pytest.raises(UserError, match="3 held-out losses"):
        AnnealLaw().fit([lagged("cosine").until(150)])
