"""The law of experts: recovery, the dense limit, expert counts, refusals."""

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.forecast import MoeStack, Points
from jaxmoe.forecast.moe_law import MoeLaw

SIZES = np.array([1.6e7, 3e7, 6e7])
RATIOS = np.array([1.0, 2.0, 5.0, 10.0, 40.0])


def experts_loss(n: np.ndarray, ratio: np.ndarray, router: np.ndarray) -> np.ndarray:
    """Floor 1.75; the gain of experts differs by router and is lost at one expert."""
    delta = np.where(router == "hash", 0.07, 0.09)
    return 1.75 + 1.4 * (n / 1.6e7) ** -0.25 * ratio**-delta


def grid(sizes: np.ndarray, *, noise: float = 0.0, seed: int = 0) -> Points:
    n, ratio = (g.ravel() for g in np.meshgrid(sizes, RATIOS))
    n, ratio = np.tile(n, 2), np.tile(ratio, 2)
    router = np.repeat(["hash", "base"], n.size // 2)
    error = np.exp(noise * np.random.default_rng(seed).standard_normal(n.size))
    loss = experts_loss(n, ratio, router) * error
    d = np.full(n.size, 1.3e11)
    experts = np.round(ratio * 1.5 - 0.5)
    return Points.of(n, d, loss, params_total=n * ratio, experts=experts, router=router.tolist())


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_larger_size_is_forecast_at_every_expert_count(noise: float) -> None:
    seen, target = grid(SIZES, noise=noise), grid(np.array([3.6e8]))
    fit = MoeStack().fit(seen)
    error = np.abs(fit.predict(target) / target.loss - 1)
    assert np.median(error) < 0.012
    assert error.max() < 0.03
    low, high = fit.mixture(target).quantile([0.05, 0.95])
    assert np.mean((low <= target.loss) & (target.loss <= high)) >= 0.8


def test_one_expert_is_the_dense_law() -> None:
    """At one expert the terms of experts vanish: the router's name cannot change a bit."""
    fit = MoeLaw().fit(grid(SIZES))
    ask = {"params_active": [2e8] * 2, "tokens": [1.3e11] * 2}
    one = fit.predict(Points.of(**ask, router=["base", "hash"]))
    assert one[0] == one[1]
    many = fit.predict(Points.of(**ask, params_total=[2e9] * 2, router=["base", "hash"]))
    assert many[0] < many[1] < one[0]  # experts help, the better router more


def test_expansions_read_different_columns() -> None:
    """Joint reads the number of experts, saturating the share of parameters."""
    seen = grid(SIZES)
    ask = {"params_active": [2e8], "tokens": [1.3e11], "router": ["base"]}
    by_count = [
        MoeLaw(expansion="joint").fit(seen).predict(Points.of(**ask, experts=[e]))[0]
        for e in (2, 64)
    ]
    by_share = [MoeLaw().fit(seen).predict(Points.of(**ask, experts=[e]))[0] for e in (2, 64)]
    assert by_count[1] < by_count[0]
    assert by_share[0] == by_share[1]


def test_weights_of_the_experts_laws() -> None:
    weights = MoeStack().fit(grid(SIZES, noise=0.002)).weights
    assert sum(weights.values()) == pytest.approx(1.0)
    assert set(weights) == {"moe saturating", "moe joint"}


def test_refusals_of_the_moe_law() -> None:
    with pytest.raises(UserError, match="0.00 decades"):
        MoeStack().fit(grid(np.array([1e8])))
    with pytest.raises(UserError, match="7 runs"):
        MoeStack().fit(grid(SIZES).take(np.arange(7)))
    with pytest.raises(UserError, match="expansion='deep'"):
        MoeLaw(expansion="deep").fit(grid(SIZES))


def test_moe_draws_are_deterministic() -> None:
    fit, target = MoeStack().fit(grid(SIZES, noise=0.003)), grid(np.array([3.6e8]))
    one, two = (fit.sample(target, n=50, rng=np.random.default_rng(3)) for _ in range(2))
    assert one.shape == (50, len(target))
    assert np.array_equal(one, two)
