"""What every law must hold: no look-ahead, large numbers, missing points, curves that do not fall,
and coverage where the truth is known. `test_laws.py` has the same of the law of one run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from forecast_cases import rates, synthetic
from ladder_cases import dense_truth, ladder, recipe
from scipy.optimize import nnls
from scipy.stats import binom
from test_moe_law import SIZES, grid

from jaxmoe.errors import UserError
from jaxmoe.forecast import MoeStack, Points, Run, Schedule, SiblingLaw, Stack
from jaxmoe.forecast.anneal import AnnealStack
from jaxmoe.forecast.baseline import TwoVariable, _non_negative
from jaxmoe.forecast.pass_rate import PassLaw

LEVELS = [0.05, 0.5, 0.95]
LARGE = Points.of([2e13], [10**16])  # 6 N D is 1.2e30: past int64 and float32's range of 3e38 / L


def spoilt(points: Points) -> Points:
    return replace(points, loss=points.loss + 7.0)


@pytest.mark.parametrize("law", [Stack, MoeStack, TwoVariable])
def test_a_targets_loss_is_not_read_across_runs(law: type) -> None:
    seen, target = grid(SIZES), grid(np.array([3.6e8]))
    if law is not MoeStack:
        seen, target = (ladder(dense_truth(np.random.default_rng(0)), top=t) for t in (3e19, 3e21))
    fit: Any = law().fit(seen)
    assert np.array_equal(fit.predict(target), fit.predict(spoilt(target)))
    if law is TwoVariable:
        draws = [
            fit.bootstrap(ask, n=20, rng=np.random.default_rng(0))
            for ask in (target, spoilt(target))
        ]
        assert np.array_equal(*draws)


@pytest.mark.parametrize("law", [Stack, MoeStack])
def test_large_numbers_do_not_overflow(law: type) -> None:
    seen = grid(SIZES) if law is MoeStack else ladder(dense_truth(np.random.default_rng(1)))
    low, middle, high = law().fit(seen).mixture(LARGE).quantile(LEVELS)[:, 0]
    assert 0 < low < middle < high < 20


def test_large_numbers_in_siblings_and_pass_rates() -> None:
    runs = recipe([1e15, 1e16, 1e17])
    low, _, high = SiblingLaw().fit(runs[2].until(120), runs[:2]).mixture().quantile(LEVELS)[:, 0]
    assert low < runs[2].loss[-1] < high
    flops = [10**k for k in range(24, 29)]  # Python ints that no int64 holds
    fit = PassLaw().fit(flops, [[k, k + 1] for k in range(5)], [[20, 20]] * 5)
    assert (np.diff(fit.predict([1e28, 1e30])) < 0).all()


@pytest.mark.parametrize("law", [Stack, MoeStack])
def test_incomplete_rows_change_nothing(law: type) -> None:
    seen = grid(SIZES) if law is MoeStack else ladder(dense_truth(np.random.default_rng(2)))
    names = ("params_active", "tokens", "loss", "flops", "params_total", "experts")
    columns = {name: np.r_[getattr(seen, name), getattr(seen, name)[:1]] for name in names}
    columns["loss"][-1] = np.nan
    more = Points.of(**columns, router=[*seen.router, "hash"])
    assert more.dropped == 1
    one, two = (law().fit(p).mixture(LARGE).quantile(LEVELS) for p in (seen, more))
    assert np.array_equal(one, two)


def missing(run: Run, places: list[int]) -> Run:
    """The run with NaN put in at these evals of it, and one of infinity."""
    steps = np.insert(run.steps, places, run.steps[places] - 1)
    bad = np.full(len(places), np.nan)
    bad[-1] = np.inf
    return replace(run, steps=steps, loss=np.insert(run.loss, places, bad))


def test_missing_evals_change_nothing_under_other_schedules() -> None:
    runs = [model_under(kind, 5)[0] for kind in ("cosine", "constant")]
    target, _ = model_under("wsd", 5)
    holes = [missing(run, [3, 9, 20]) for run in runs]
    assert [run.dropped for run in holes] == [3, 3]
    one, two = (AnnealStack().fit(r).predict(target, [500, 1000]) for r in (runs, holes))
    assert np.array_equal(one, two)


SHAPES = {"constant": lambda x: np.full(x.size, 3.0), "rising": lambda x: 3.0 + 0.5 * x}


@pytest.mark.parametrize("shape", SHAPES)
def test_expert_runs_that_do_not_fall_give_finite_forecasts(shape: str) -> None:
    seen = grid(SIZES)
    size = np.log(seen.params_active / seen.params_active.min())
    flat = replace(seen, loss=SHAPES[shape](size))
    target = grid(np.array([3.6e8]))
    low, middle, high = MoeStack().fit(flat).mixture(target).quantile(LEVELS)
    assert np.isfinite([low, middle, high]).all()
    assert ((low < middle) & (middle < high)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_of_curves_that_do_not_fall_stay_flat(shape: str) -> None:
    """No term can be negative: a rise is not continued, and nothing blows up far ahead."""
    runs = []
    for kind in ("cosine", "constant"):
        run, _ = synthetic(6, kind)
        runs.append(replace(run, loss=SHAPES[shape](run.steps / run.schedule.steps)))
    fit = AnnealStack().fit(runs)
    target, _ = synthetic(6, "wsd")
    path = fit.predict(target, [100, 500, 1000])
    assert np.ptp(path) < 0.01
    assert 3.0 - 1e-6 <= path[0] <= 3.5
    assert np.isfinite(fit.sample(target, [1000], n=9, rng=np.random.default_rng(0))).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_target_that_does_not_fall_is_still_forecast_by_siblings(shape: str) -> None:
    *donors, whole = recipe([1e7, 3e7, 1e8])
    odd = replace(whole, loss=SHAPES[shape](whole.steps / whole.schedule.steps)).until(120)
    low, middle, high = SiblingLaw().fit(odd, donors).mixture().quantile(LEVELS)[:, 0]
    assert np.isfinite([low, middle, high]).all()
    assert low < middle < high
    assert middle < odd.loss[-1]  # its siblings did fall from here
    flat = [replace(run, loss=np.full(run.loss.size, 3.0)) for run in donors]
    with pytest.raises(UserError, match="none of 2 siblings"):
        SiblingLaw().fit(odd, flat)


@pytest.mark.parametrize("solved", [[0] * 6, [20] * 6, [7] * 6, [18, 15, 12, 9, 6, 3]])
def test_pass_rates_that_do_not_rise_give_finite_forecasts(solved: list[int]) -> None:
    flops = np.geomspace(1e18, 1e20, 6)
    fit = PassLaw().fit(flops, [[k] * 30 for k in solved], [[20] * 30] * 6)
    low, middle, high = fit.quantile([1e21], LEVELS)[:, 0]
    assert 0 < low < middle < high < np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1e18])
def test_a_senseless_compute_of_pass_rates_is_refused(bad: float) -> None:
    flops = [1e18, 3e18, 1e19, 1e20, bad]
    with pytest.raises(UserError, match="flops="):
        PassLaw().fit(flops, [[1]] * 5, [[2]] * 5)


def test_expert_intervals_cover_synthetic_truth() -> None:
    """30 recipes with floors and exponents of their own, forecast at six times the size."""
    inside, asked = 0, 30
    for seed in range(asked):
        rng = np.random.default_rng(seed)
        floor, alpha, delta = rng.uniform(1.5, 2.0), rng.uniform(0.2, 0.35), rng.uniform(0.05, 0.1)

        def truth(p: Points, floor=floor, alpha=alpha, delta=delta) -> np.ndarray:
            ratio = p.params_total / p.params_active
            return floor + 1.4 * (p.params_active / 1.6e7) ** -alpha * ratio**-delta

        seen, target = grid(SIZES), grid(np.array([3.6e8])).take([2])
        seen = replace(seen, loss=truth(seen) * np.exp(0.003 * rng.standard_normal(len(seen))))
        low, high = MoeStack().fit(seen).mixture(target).quantile([0.05, 0.95])[:, 0]
        inside += low <= truth(target)[0] <= high
    assert inside >= binom.ppf(1e-3, asked, 0.9)


def model_under(kind: str, seed: int, *, steps: int = 1000) -> tuple[Run, float]:
    """A model of its own floor, exponents and depth under a schedule, and its last loss without
    noise. Its drops are felt by a sum of two lags: neither kernel is the truth."""
    rng = np.random.default_rng(seed)
    floor, alpha, depth = rng.uniform(1.5, 2.5), rng.uniform(0.3, 0.6), rng.uniform(0, 1)
    drop, fast, slow = rng.uniform(0.08, 0.15), rng.uniform(5, 20), rng.uniform(50, 150)
    lr = rates(kind, steps=steps, final=0.1)
    x = (np.cumsum(lr) / 1000) ** -alpha
    fall = -np.diff(Schedule.of(lr).annealing, prepend=1.0)
    gain = np.zeros(steps)
    for at in np.flatnonzero(fall):
        since = np.arange(steps - at)
        gain[at:] += fall[at] * (1 - 0.5 * np.exp(-since / fast) - 0.5 * np.exp(-since / slow))
    clean = floor + 0.3 * x - drop * gain * x**depth
    at = np.arange(100, steps + 1, 20)
    noise = np.random.default_rng([seed, len(kind)]).standard_normal(at.size)
    run = Run(schedule=Schedule.of(lr), steps=at, loss=clean[at - 1] * (1 + 0.001 * noise))
    return run, float(clean[-1])


def test_schedule_intervals_cover_synthetic_truth() -> None:
    """15 models, three times as long as any curve that was seen."""
    inside, asked, error = 0, 15, []
    for seed in range(asked):
        runs = [model_under(kind, seed)[0] for kind in ("cosine", "constant")]
        target, final = model_under("wsd", seed, steps=3000)
        fit = AnnealStack().fit(runs)
        drawn = fit.sample(target, [3000], n=1000, rng=np.random.default_rng(seed))[:, 0]
        low, middle, high = np.quantile(drawn, LEVELS)
        inside += low <= final <= high
        error.append(abs(middle / final - 1))
    assert inside >= binom.ppf(1e-3, asked, 0.9)
    assert np.median(error) < 0.01


def test_the_bootstrap_of_the_usual_law() -> None:
    """On noise-free truth of the law it is narrow and right; it widens with the noise."""
    truth = {"e": 1.7, "a": 0.35, "b": 0.35, "n": 0.4, "d": 0.4}
    target = ladder(truth, top=3e21, noise=0.0, budgets=1)
    widths = []
    for noise in (0.0, 0.01):
        seen = ladder(truth, noise=noise, budgets=12)
        fit = TwoVariable(power=0.0).fit(seen)
        drawn = fit.bootstrap(target, n=100, rng=np.random.default_rng(1))
        again = fit.bootstrap(target, n=100, rng=np.random.default_rng(1))
        assert drawn.shape == (100, 1)
        assert np.array_equal(drawn, again)
        low, middle, high = np.quantile(drawn, LEVELS)
        widths.append(high - low)
        if noise == 0.0:
            assert middle == pytest.approx(target.loss[0], rel=0.005)
    assert widths[1] > 3 * widths[0]


def test_the_bootstrap_solves_as_scipy_does() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        rows, y = rng.standard_normal((8, 3)), rng.standard_normal(8)
        weight = rng.integers(0, 3, 8) * rng.uniform(0.1, 2, 8) + 1e-3
        square = np.einsum("n,np,nq->pq", weight, rows, rows)[None]
        terms, error = _non_negative(square, (weight * y) @ rows[None], np.array([weight @ y**2]))
        root = np.sqrt(weight)
        wanted, distance = nnls(rows * root[:, None], y * root)
        assert terms[0] == pytest.approx(wanted, abs=1e-8)
        assert error[0] == pytest.approx(distance**2, abs=1e-8)


def test_the_bootstrap_refits_as_the_law_is_fitted() -> None:
    """A draw in which each run comes once gives the law's own forecast."""
    seen = ladder(dense_truth(np.random.default_rng(3)), noise=0.003)
    target = ladder(dense_truth(np.random.default_rng(3)), top=3e21, budgets=2)
    fit = TwoVariable().fit(seen)

    class Once:
        def multinomial(self, count: int, share: np.ndarray, size: int) -> np.ndarray:
            return np.ones((size, count), np.int64)

    drawn = fit.bootstrap(target, n=2, rng=Once())  # type: ignore[arg-type]
    assert drawn == pytest.approx(np.tile(fit.predict(target), (2, 1)), rel=2e-3)
