"""Schedules: recovery of a law's own truth, prediction of others, no look-ahead, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from forecast_cases import rates, synthetic

from jaxmoe.errors import UserError
from jaxmoe.forecast import Run, Schedule
from jaxmoe.forecast.anneal import DEPTHS, KERNELS, AnnealLaw, AnnealStack


def lagged(kind: str, steps: int = 2000) -> Run:
    """A run of the lag law itself: c 2, A 0.3, alpha 0.5, B 0.12, tau 0.03 of 2000 steps, depth
    0.5."""
    lr = rates(kind, steps=steps, final=0.1)
    schedule = Schedule.of(lr)
    fall = -np.diff(schedule.annealing, prepend=1.0)
    gain = np.zeros(steps)
    for at in np.flatnonzero(fall):
        gain[at:] += fall[at] * -np.expm1(-(np.arange(steps - at)) / 60.0)
    x = (np.cumsum(schedule.lr) / 2000) ** -0.5
    loss = 2.0 + 0.3 * x - 0.12 * gain * x**0.5
    at = np.arange(100, steps + 1, 20)
    return Run(schedule=schedule, steps=at, loss=loss[at - 1], name=kind)


def test_the_lag_law_finds_its_own_parameters() -> None:
    fit = AnnealLaw(kernel="lag").fit([lagged("cosine"), lagged("constant"), lagged("wsd")])
    alpha, tau = fit.shape[0], np.exp(fit.shape[1])
    assert fit.terms == pytest.approx([2.0, 0.3, 0.12], rel=0.02)
    assert alpha == pytest.approx(0.5, rel=0.02)
    assert tau == pytest.approx(0.03, rel=0.05)


def test_depths_differ_in_how_drops_fade() -> None:
    """The same early drops, three depths: the deeper, the less a late drop is worth."""
    seen = [lagged("cosine"), lagged("constant")]
    late = lagged("wsd", steps=8000)
    flat = lagged("constant", steps=8000)
    gains = []
    for depth in DEPTHS[::2]:
        fit = AnnealLaw(depth=depth).fit(seen)
        gains.append(fit.predict(flat, [8000])[0] - fit.predict(late, [8000])[0])
    assert gains[0] > gains[1] > gains[2] > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_longer_schedule_is_predicted(kernel: str) -> None:
    """Twice the steps, another shape, from two short runs: within 0.5 % at the end."""
    fit = AnnealLaw(kernel=kernel).fit([lagged("cosine"), lagged("constant")])
    longer = lagged("wsd", steps=4000)
    predicted = fit.predict(longer, longer.steps)
    assert predicted[-1] == pytest.approx(longer.loss[-1], rel=0.005)
    assert np.mean(np.abs(predicted / longer.loss - 1)) < 0.003


def test_the_targets_own_losses_are_not_read() -> None:
    fit = AnnealStack().fit([lagged("cosine"), lagged("constant")])
    target = lagged("wsd")
    spoilt = replace(target, loss=target.loss + 5.0)
    assert np.array_equal(fit.predict(target, target.steps), fit.predict(spoilt, target.steps))


def test_another_truth_than_the_laws() -> None:
    """Runs of `forecast_cases`, with a drift and noise no kernel has: within 2 % at the end."""
    runs = [synthetic(3, kind, noise=0.001)[0] for kind in ("cosine", "constant")]
    target, final = synthetic(3, "wsd", noise=0.001)
    fit = AnnealStack().fit(runs)
    assert fit.predict(target, [1000])[0] == pytest.approx(final, rel=0.02)


def test_a_lone_constant_run_has_no_drops() -> None:
    fit = AnnealLaw().fit([lagged("constant")])
    assert np.isfinite(fit.predict(lagged("cosine"), [1000, 2000])).all()


def test_draws_widen_beyond_what_was_fitted() -> None:
    fit = AnnealLaw().fit([lagged("cosine"), lagged("constant")])
    longer = lagged("constant", steps=20000)
    drawn = fit.sample(longer, [1000, 20000], n=4000, rng=np.random.default_rng(0))
    near, far = drawn.std(0) / drawn.mean(0)
    assert far > 3 * near


def test_the_stack_is_the_mean_of_its_depths() -> None:
    stack = AnnealStack().fit([lagged("cosine"), lagged("constant")])
    target, ask = lagged("wsd", steps=8000), [2000, 8000]
    each = np.array([fit.predict(target, ask) for fit in stack.fits])
    assert len(each) == len(DEPTHS)
    assert np.allclose(stack.predict(target, ask), each.mean(0), rtol=1e-12)
    drawn = stack.sample(target, ask, n=4000, rng=np.random.default_rng(0))
    assert np.array_equal(drawn, stack.sample(target, ask, n=4000, rng=np.random.default_rng(0)))
    assert drawn.mean(0) == pytest.approx(each.mean(0), rel=0.001)
    assert (drawn.std(0) > each.std(0)).all()  # where the depths part, so do the draws


def test_a_spike_hardly_moves_the_fit() -> None:
    clean = [lagged("cosine"), lagged("constant")]
    loss = clean[0].loss.copy()
    loss[40] *= 1.5
    target = lagged("wsd")
    before = AnnealLaw().fit(clean).predict(target, [2000])
    after = AnnealLaw().fit([replace(clean[0], loss=loss), clean[1]]).predict(target, [2000])
    assert after == pytest.approx(before, rel=0.001)


def test_refusals_of_the_annealing_law() -> None:
    with pytest.raises(UserError, match="kernel='cubic'"):
        AnnealLaw(kernel="cubic").fit([lagged("cosine")])
    with pytest.raises(UserError, match="0 held-out losses"):
        AnnealLaw().fit([])
    with pytest.raises(UserError, match="3 held-out losses"):
        AnnealLaw().fit([lagged("cosine").until(150)])
