"""Pass rates: zero counts, recovery of the power law, coverage, refusals."""

import numpy as np
import pytest
from scipy.stats import binom

from jaxmoe.errors import UserError
from jaxmoe.forecast.pass_rate import PassLaw, buckets, mean_log_pass

FLOPS = np.geomspace(1e18, 1e20, 6)


def counts(flops: float, rng: np.random.Generator, tasks: int = 40, tries: int = 100) -> np.ndarray:
    """-E log p = 2 (C / 1e19)^-0.3 with tasks about it."""
    mean = 2.0 * (flops / 1e19) ** -0.3
    p = np.exp(-mean * rng.gamma(8.0, 1 / 8.0, tasks))
    return rng.binomial(tries, p)


def test_zero_counts_are_finite_and_worse_than_one() -> None:
    value, error = mean_log_pass([0, 0, 0], [20, 20, 20])
    some, _ = mean_log_pass([1, 1, 1], [20, 20, 20])
    assert np.isfinite([value, error]).all()
    assert error > 0
    assert value > some > -np.log(0.2)


def test_many_tries_give_the_plain_mean() -> None:
    k, n = np.array([5000, 2000, 8000]), np.full(3, 10000)
    value, error = mean_log_pass(k, n)
    assert value == pytest.approx(-np.mean(np.log(k / n)), rel=0.01)
    assert error < 0.02


def test_the_power_law_is_recovered_and_covered() -> None:
    """25 draws, forecast at 30 times the compute."""
    inside, error = 0, []
    truth = 2.0 * (3e21 / 1e19) ** -0.3
    for seed in range(25):
        rng = np.random.default_rng(seed)
        solved = [counts(c, rng) for c in FLOPS]
        fit = PassLaw().fit(FLOPS, solved, [np.full(40, 100)] * 6)
        low, middle, high = fit.quantile([3e21], [0.05, 0.5, 0.95])[:, 0]
        inside += low <= truth <= high
        error.append(middle / truth - 1)
    assert inside >= binom.ppf(1e-3, 25, 0.9)
    assert abs(np.median(error)) < 0.1
    drawn = fit.sample([3e21], n=500, rng=np.random.default_rng(0))
    assert np.median(drawn) == pytest.approx(middle, rel=0.1)
    assert fit.predict([3e21])[0] == pytest.approx(middle)


def test_buckets_are_equal_and_by_difficulty() -> None:
    parts = buckets([3.0, 1.0, 2.0, 1.0, 5.0, 4.0], 3)
    assert [p.tolist() for p in parts] == [[1, 3], [0, 2], [4, 5]]
    with pytest.raises(UserError, match="count=7"):
        buckets([1.0] * 6, 7)


def test_refusals_of_pass_rates() -> None:
    with pytest.raises(UserError, match="5 solved of 4"):
        mean_log_pass([5], [4])
    with pytest.raises(UserError, match="3 distinct"):
        PassLaw().fit([1e18, 1e19, 1e20], [[1]] * 3, [[2]] * 3)
    with pytest.raises(UserError, match="0.30 decades"):
        PassLaw().fit(np.geomspace(1e18, 2e18, 4), [[1]] * 4, [[2]] * 4)
