"""The rest of a run from completed cheaper runs: no look-ahead, coverage, conformal width."""

from dataclasses import replace

import numpy as np
import pytest
from ladder_cases import STEPS, recipe
from scipy.stats import binom

from jaxmoe.errors import UserError
from jaxmoe.forecast import Run, SiblingLaw
from jaxmoe.forecast.siblings import CONFORMAL, Constants, usable_siblings

SIZES = [1e7, 3e7, 1e8, 3e8, 1e9]
LEVELS = [0.05, 0.5, 0.95]


def thin(run: Run, keep: list[int]) -> Run:
    """The run with the evals at these steps only."""
    at = np.isin(run.steps, keep)
    return replace(run, steps=run.steps[at], loss=run.loss[at])


def test_error_and_coverage_of_the_end() -> None:
    """40 runs, a third seen: better than the nearest sibling's ratio, and covered as it says."""
    inside, own, ratio = 0, [], []
    for seed in range(40):
        *donors, whole = recipe(SIZES, seed=seed)
        target = whole.until(STEPS // 3)
        fit = SiblingLaw().fit(target, donors)
        low, middle, high = fit.mixture().quantile(LEVELS)[:, 0]
        outcome = whole.loss[-1]
        inside += low <= outcome <= high
        own.append(abs(middle / outcome - 1))
        near = donors[-1]
        at = near.loss[np.searchsorted(near.steps, target.steps[-1])]
        ratio.append(abs(target.loss[-1] * near.loss[-1] / at / outcome - 1))
    assert inside >= binom.ppf(1e-3, 40, 0.9)
    assert np.median(own) < 0.003
    assert np.median(own) < 0.7 * np.median(ratio)


def test_nothing_past_the_cut_off_is_read() -> None:
    """The target's later evals, and its siblings' between cut-off and end, change no bit."""
    *donors, whole = recipe(SIZES)
    cut = 120
    law = SiblingLaw()
    first = law.fit(whole.until(cut), donors).mixture().quantile(LEVELS)
    after = whole.steps > cut
    spoilt = replace(whole, loss=np.where(after, 99.0, whole.loss)).until(cut)
    moved = []
    for run in donors:
        between = (run.steps > cut) & (run.steps < STEPS)
        moved.append(replace(run, loss=np.where(between, 50.0, run.loss)))
    assert np.array_equal(first, law.fit(spoilt, moved).mixture().quantile(LEVELS))


def test_a_sparse_curve_does_not_leak() -> None:
    """The target's last eval is at 100 of 400, the next at 300; at a cut of 290 the forecast is
    that of a cut at 100: interpolating to 290 would use the eval that is still to come."""
    *donors, whole = recipe(SIZES)
    sparse = thin(whole, [20, 60, 100, 300, 400])
    law = SiblingLaw()
    late = law.fit(sparse.until(290), donors).mixture().quantile(LEVELS)
    assert np.array_equal(late, law.fit(sparse.until(100), donors).mixture().quantile(LEVELS))
    assert not np.array_equal(late, law.fit(sparse.until(300), donors).mixture().quantile(LEVELS))


def test_who_is_a_sibling() -> None:
    small, same, large = recipe([1e7, 1e8, 1e9])
    target = recipe([1e8])[0]
    partial = recipe([2e7])[0].until(STEPS - 10)
    nameless = replace(recipe([2e7])[0], params_active=None)
    assert usable_siblings(target, [small, same, large, partial, nameless]) == [small]


def test_refusals_of_the_sibling_law() -> None:
    *donors, whole = recipe(SIZES)
    law = SiblingLaw()
    with pytest.raises(UserError, match="no held-out loss yet"):
        law.fit(whole.until(5), donors)
    with pytest.raises(UserError, match="params_active is missing"):
        law.fit(replace(whole, params_active=None), donors)
    with pytest.raises(UserError, match="none of 1 siblings"):
        law.fit(whole.until(100), [whole])
    rising = replace(donors[0], loss=donors[0].loss[::-1].copy())
    with pytest.raises(UserError, match="none of 1 siblings"):
        law.fit(whole.until(100), [rising])


def test_one_sibling_is_less_certain_than_four() -> None:
    *donors, whole = recipe(SIZES)
    target = whole.until(120)
    many = SiblingLaw().fit(target, donors).mixture().quantile(LEVELS)[:, 0]
    one = SiblingLaw().fit(target, donors[:1]).mixture().quantile(LEVELS)[:, 0]
    assert one[2] - one[0] > 1.5 * (many[2] - many[0])


def test_conformal_width_from_many_siblings() -> None:
    """With 20 siblings their own leave-one-out errors set the width: more noise, a wider interval
    even where the law believes in none; with 19 there is no such factor."""
    sizes = np.geomspace(1e7, 1e9, CONFORMAL).tolist()
    fits = {}
    for noise in (0.0002, 0.006):
        donors = recipe(sizes, noise=noise, every=100)
        target = recipe([2e9], noise=0.0, every=100)[0].until(200)
        fits[noise] = SiblingLaw().fit(target, donors)
    quiet, loud = (fit.conformal_factor() for fit in fits.values())
    assert 0.5 <= quiet < loud <= 4.0
    few = SiblingLaw().fit(target, donors[1:])
    assert few.sizes.size == CONFORMAL - 1
    assert few.conformal_factor() == 1.0


def test_nan_evals_are_left_out() -> None:
    *donors, whole = recipe(SIZES)
    loss = whole.loss.copy()
    loss[5] = np.nan
    target = replace(whole, loss=loss).until(120)
    assert target.dropped == 1
    assert np.isfinite(SiblingLaw().fit(target, donors).predict()).all()


def test_sibling_draws_match_the_quantiles() -> None:
    *donors, whole = recipe(SIZES)
    fit = SiblingLaw().fit(whole.until(120), donors)
    drawn = fit.sample(n=4000, rng=np.random.default_rng(0))
    assert np.array_equal(drawn, fit.sample(n=4000, rng=np.random.default_rng(0)))
    assert np.quantile(drawn, LEVELS) == pytest.approx(
        fit.mixture().quantile(LEVELS)[:, 0], rel=0.002
    )


def test_the_more_siblings_the_more_their_scatter_counts() -> None:
    """Of one sibling the prior is narrowed nearly in full, of a hundred hardly."""
    k = Constants(width=0.25, known=8.0)
    factors = [k.width_of(n) for n in (0, 1, 8, 100)]
    assert factors == pytest.approx([0.25, 1 / 3, 0.625, 102 / 108])
    *donors, whole = recipe(SIZES)
    fit = SiblingLaw().fit(whole.until(120), donors)
    wide, narrow = (
        replace(fit, noise=0.0, law=SiblingLaw(constants=Constants(width=w, seed=0.0))).mixture()
        for w in (1.0, 0.25)
    )
    ratio = np.ptp(narrow.quantile(LEVELS)) / np.ptp(wide.quantile(LEVELS))
    assert ratio == pytest.approx(Constants(width=0.25).width_of(len(donors)), rel=1e-6)
