"""Laws over compute: accuracy and coverage on synthetic truth, backtests, flags, determinism."""

import numpy as np
import pytest
from ladder_cases import dense_loss, dense_truth, ladder, target_of
from scipy.stats import binom

from jaxmoe.forecast import Points, Stack
from jaxmoe.forecast.baseline import TwoVariable, compute_floor
from jaxmoe.forecast.dense_laws import LAWS
from jaxmoe.forecast.mixture import Mixture, combine
from jaxmoe.forecast.stack import frontier_spread, misfits

LEVELS = [0.05, 0.5, 0.95]


def test_coverage_and_error_on_synthetic_truth() -> None:
    """60 ladders, 30 times extrapolated: a 90 % interval covers 90 % by the binomial's 1e-3 tail,
    is not vacuous, and the median is nearer than the usual two-variable fit's."""
    inside, own, usual, width = 0, [], [], []
    for seed in range(60):
        truth = dense_truth(np.random.default_rng(seed))
        points = ladder(truth, seed=seed)
        target, outcome = target_of(truth, 30 * points.flops.max())
        low, middle, high = Stack().fit(points).mixture(target).quantile(LEVELS)[:, 0]
        inside += low <= outcome <= high
        own.append(abs(middle / outcome - 1))
        usual.append(abs(TwoVariable().fit(points).predict(target)[0] / outcome - 1))
        width.append((high - low) / outcome)
    assert inside >= binom.ppf(1e-3, 60, 0.9)
    assert np.median(own) < 0.01
    assert np.median(own) < np.median(usual)
    assert np.median(width) < 0.10


def test_the_interval_widens_with_the_ratio() -> None:
    truth = dense_truth(np.random.default_rng(1))
    points = ladder(truth)
    n = np.sqrt(points.flops.max() * np.array([2.0, 10.0, 100.0]) / 120)
    low, _, high = Stack().fit(points).mixture(Points.of(n, 20 * n)).quantile(LEVELS)
    width = (high - low).tolist()
    assert width == sorted(width)
    assert width[2] > 2 * width[0]


def test_a_transient_of_small_runs_does_not_bend_the_forecast() -> None:
    """Under-tuned small runs (15 % at a 256th of the compute) move the forecast by under 1 %."""
    truth = dense_truth(np.random.default_rng(3))
    points = ladder(truth, noise=0.0)
    excess = 0.15 * (points.flops / points.flops.min()) ** -0.8
    bent = Points.of(points.params_active, points.tokens, points.loss * (1 + excess))
    target, outcome = target_of(truth, 30 * points.flops.max())
    assert Stack().fit(bent).predict(target)[0] == pytest.approx(outcome, rel=0.01)


def test_the_same_runs_give_the_same_bits_in_any_order() -> None:
    truth = dense_truth(np.random.default_rng(4))
    points = ladder(truth, seed=4)
    target, _ = target_of(truth, 1e21)
    one = Stack().fit(points).mixture(target).quantile(LEVELS)
    assert np.array_equal(one, Stack().fit(points).mixture(target).quantile(LEVELS))
    shuffled = points.take(np.random.default_rng(0).permutation(len(points)))
    assert np.allclose(one, Stack().fit(shuffled).mixture(target).quantile(LEVELS), rtol=1e-9)
    draws = [
        Stack().fit(points).sample(target, n=2000, rng=np.random.default_rng(7)) for _ in range(2)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert np.quantile(draws[0], 0.5) == pytest.approx(one[1, 0], rel=0.005)


@pytest.mark.parametrize("shape", ["constant", "rising"])
def test_losses_that_do_not_fall_give_finite_forecasts(shape: str) -> None:
    points = ladder(dense_truth(np.random.default_rng(5)))
    loss = np.full(len(points), 3.0)
    if shape == "rising":
        loss = loss + 0.05 * np.arange(len(points))
    flat = Points.of(points.params_active, points.tokens, loss)
    target = Points.of([1e9], [2e10])
    low, middle, high = Stack().fit(flat).mixture(target).quantile(LEVELS)[:, 0]
    assert np.isfinite([low, middle, high]).all()
    assert low < middle < high
    assert high - low > 0.02  # nothing is known well of such runs


def test_backtests_see_only_smaller_runs() -> None:
    """The outcome of the largest run changes a backtest's error by itself alone."""
    truth = dense_truth(np.random.default_rng(6))
    points = ladder(truth, budgets=10)
    loss = points.loss.copy()
    loss[-1] *= 1.05
    moved = Points.of(points.params_active, points.tokens, loss)
    before, after = Stack().fit(points).backtests, Stack().fit(moved).backtests
    assert len(before) == 2
    for one, two in zip(before, after, strict=True):
        was = (np.array(one.error) + 1) * points.loss[-1]
        assert np.allclose(was, (np.array(two.error) + 1) * loss[-1], rtol=1e-12)
    assert [b.ratio for b in before] == pytest.approx([4.0, 16.0], rel=0.01)


def test_compute_alone_is_a_law_of_a_frontier_only() -> None:
    truth = dense_truth(np.random.default_rng(8))
    line = ladder(truth)
    assert frontier_spread(line) < 0.35
    assert "compute" in Stack().fit(line).weights
    n, ratio = (g.ravel() for g in np.meshgrid([2e7, 1e8, 5e8], [5.0, 40.0, 320.0]))
    grid = Points.of(n, n * ratio, dense_loss(truth, n, n * ratio))
    assert frontier_spread(grid) > 1.0
    assert "compute" not in Stack().fit(grid).weights


def test_a_mistuned_rung_is_flagged_and_no_other() -> None:
    points = ladder(dense_truth(np.random.default_rng(9)), noise=0.001)
    assert misfits(points) == []
    loss = points.loss.copy()
    loss[5] *= 1.06
    assert misfits(Points.of(points.params_active, points.tokens, loss)) == [5]


def test_the_floor_three_ways() -> None:
    """On exact data of L = 1.7 + a C^-0.15 all agree; with noise the profile is wide."""
    c = np.geomspace(1e17, 1e20, 10)
    n = np.sqrt(c / 120)
    exact = 1.7 + 2.0 * (c / 1e18) ** -0.15
    floor = compute_floor(Points.of(n, 20 * n, exact), 1e22, pinned_at=1.7)
    assert floor.free == pytest.approx((1.7, 0.15), abs=0.01)
    assert floor.pinned == pytest.approx(0.15, abs=0.001)
    assert floor.forecasts is not None
    truth = 1.7 + 2.0 * 1e4**-0.15
    assert floor.forecasts[0] == pytest.approx(truth, rel=0.005)
    assert floor.forecasts[2] == pytest.approx(truth, rel=0.005)
    noisy = exact * np.exp(0.005 * np.random.default_rng(0).standard_normal(10))
    wide = compute_floor(Points.of(n, 20 * n, noisy))
    assert wide.profiled[1] < 1.7 < wide.profiled[2]
    assert wide.profiled[2] - wide.profiled[1] > 0.2
    assert wide.forecasts is None


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_each_law_fits_predicts_and_samples(law) -> None:
    truth = dense_truth(np.random.default_rng(10))
    points = ladder(truth, noise=0.0)
    target, outcome = target_of(truth, 4 * points.flops.max())
    fit = law.fit(points)
    assert fit.predict(target)[0] == pytest.approx(outcome, rel=0.01)
    drawn = fit.sample(target, n=500, rng=np.random.default_rng(0))
    assert drawn.shape == (500, 1)
    assert abs(np.median(drawn) / outcome - 1) < 0.01


def test_mixtures() -> None:
    one = Mixture(weight=np.array([1.0]), mean=np.array([[2.0]]), sd=np.array([[0.1]]))
    low, middle, high = one.quantile(LEVELS)[:, 0]
    assert (low, middle, high) == pytest.approx((2 - 0.16449, 2.0, 2 + 0.16449), abs=1e-4)
    assert one.surprise(np.array([2.3]))[0] == pytest.approx(3.0, abs=1e-9)
    assert one.surprise(np.array([-18.0]))[0] == pytest.approx(-200.0, rel=1e-6)  # far in the tail
    assert one.log_score(np.array([2.0]))[0] == pytest.approx(-np.log(0.1 * np.sqrt(2 * np.pi)))
    two = Mixture(weight=np.array([1.0]), mean=np.array([[3.0]]), sd=np.array([[0.1]]))
    both = combine([one, two], np.array([3.0, 1.0]))
    assert both.cdf(np.array([[2.5]]))[0, 0] == pytest.approx(0.75, abs=1e-6)
    narrow = one.calibrated(width=0.5, extra=0.0)
    assert np.diff(narrow.quantile([0.05, 0.95])[:, 0])[0] == pytest.approx(0.16449, abs=1e-4)


def test_few_budgets_widen_the_interval() -> None:
    """Beside what the members know: by sqrt(1 + few / (budgets - 3)), reruns counted once."""
    truth = dense_truth(np.random.default_rng(10))
    four, many = (Stack().fit(ladder(truth, budgets=b)) for b in (4, 12))
    assert (four.budgets, many.budgets) == (4, 12)
    assert four.width(0.5, 2.0) == pytest.approx(0.5 * np.sqrt(3.0))
    assert many.width(0.5, 2.0) == pytest.approx(0.5 * np.sqrt(1 + 2 / 9))
    assert many.width(0.5, 0.0) == 0.5
    k = many.fits[0].law.constants
    target = Points.of([1e9], [2e10])
    own = many.uncalibrated(target)
    drawn = many.mixture(target)
    extra = k.misfit * many.spread * own.predict()
    assert drawn.sd**2 == pytest.approx((many.width() * own.sd) ** 2 + extra**2)
