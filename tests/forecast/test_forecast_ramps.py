"""Runs whose batch grows: progress by rate and batch, not by steps; others bit for bit the same."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from forecast_cases import STEPS, rates, synthetic

from jaxmoe import optim
from jaxmoe.config import BatchStage, Config, OptimConfig, TrainConfig
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.forecast import Run, Schedule, forecast_final


def test_progress_and_noise_by_hand() -> None:
    """Two steps of 100 tokens in the warm-up, two after it, and two of 400, the last decayed."""
    lr, tokens = [0.25, 0.5, 1, 1, 1, 0.5], [100, 200, 300, 400, 800, 1200]
    plan = Schedule(lr=np.array(lr), tokens=np.array(tokens))
    assert plan.batch.tolist() == [0.25, 0.25, 0.25, 0.25, 1, 1]
    assert plan.time.tolist() == [0.25, 0.5, 0.75, 1, 2, 3]
    assert plan.progress.tolist() == [0.125, 0.25, 0.5, 0.5, 1, 0.5]
    assert plan.lr_sum([2, 6]).tolist() == [0.375, 2.875]
    assert plan.warmup_end == 3 and plan.warmup_progress == 1.5
    low = replace(plan, lr=plan.lr * [0.5, 0.5, 0.5, 0.5, 1, 1])  # the sqrt rule
    assert low.warmup_end == 3 and low.warmup_progress == 0.75
    # The noise is lr / sqrt(batch), over its peak of 2: a larger batch anneals.
    assert plan.annealing.tolist() == [1, 1, 1, 1, 0.5, 0.25]


@pytest.mark.parametrize(
    ("rule", "noise"), [("none", [1, 0.5]), ("sqrt", [1, 1]), ("linear", [0.5, 1])]
)
@pytest.mark.parametrize(("ramp_at", "warmup_ends"), [(2000, 10), (480, 10)])
def test_warm_up_and_noise_of_a_config(
    rule: Any, noise: list[float], ramp_at: int, warmup_ends: int
) -> None:
    """4 times the batch after 20 steps, or in the middle of a warm-up of 10; 120 or 480 tokens a
    step. A rate that the rule raises with the batch is no warm-up."""
    train = TrainConfig(
        steps=60,
        batch_size=4,
        seq_len=30,
        batch_ramp=(BatchStage(tokens=ramp_at, batch_size=16),),
    )
    config = Config(train=train, optim=OptimConfig(warmup_steps=10, batch_rule=rule))
    plan = Schedule(lr=optim.rates(config), tokens=curriculum(config).by_step())
    assert plan.warmup_end == warmup_ends
    if ramp_at == 2000:
        assert plan.annealing[[12, 30]] == pytest.approx(noise)
        assert plan.annealing[0] == pytest.approx(noise[0])


@pytest.mark.parametrize("tokens_per_step", [1.0, 2048, 1 / 3, 6e7 + 1])
@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_equal_batches_are_counted_in_steps_bit_for_bit(kind: str, tokens_per_step: float) -> None:
    plan = Schedule.of(rates(kind), tokens_per_step=tokens_per_step)
    end = int(np.argmax(plan.lr >= 0.999)) + 1
    assert plan.warmup_end == end and plan.warmup_progress == end
    assert np.array_equal(plan.batch, np.ones(STEPS))
    assert np.array_equal(plan.time, np.arange(1, STEPS + 1))
    assert np.array_equal(plan.lr_sum(np.arange(1, STEPS + 1)), np.cumsum(plan.lr))
    annealing = plan.lr.copy()
    annealing[:end] = 1.0
    assert np.array_equal(plan.annealing, annealing)


def test_tokens_must_rise() -> None:
    with pytest.raises(UserError, match="step 3 ends at 20.0 tokens, no more than the one before"):
        Schedule(lr=np.ones(3), tokens=np.array([10.0, 20, 20]))


def ramped(run: Run, small: int, share: float) -> Run:
    """The same tokens and, under optim.batch_rule=sqrt, the same losses: up to a `share` of them in
    batches `small` times smaller, at a rate sqrt(small) times lower (Malladi et al. 2022)."""
    plan, first = run.schedule, int(share * run.schedule.steps)
    each = plan.tokens[0]
    lr = np.concatenate([np.repeat(plan.lr[:first], small) / np.sqrt(small), plan.lr[first:]])
    tokens = np.cumsum(np.r_[np.full(small * first, each / small), np.full(STEPS - first, each)])
    steps = np.where(run.steps <= first, small * run.steps, run.steps + (small - 1) * first)
    return Run(schedule=Schedule(lr=lr, tokens=tokens), steps=steps, loss=run.loss)


@pytest.mark.parametrize(("share", "cut"), [(0.4, 8), (0.4, 15), (0.4, 22), (0.6, 20)])
def test_the_forecast_of_a_ramp_is_that_of_its_tokens(share: float, cut: int) -> None:
    """`cut` observations are seen, one each 2.5 % of the tokens: before the ramp, at its end, and
    when it is long over. Counted in steps all before its end is warm-up, and left out."""
    error, apart = [], []
    for seed in range(6):
        plain, truth = synthetic(seed, "wsd")
        plain = replace(plain, steps=plain.steps[2:], loss=plain.loss[2:])  # after the warm-up
        run = ramped(plain, 8, share)
        seen, same = int(run.steps[cut - 1]), forecast_final(plain.until(int(plain.steps[cut - 1])))
        found = forecast_final(run.until(seen))
        error.append(abs(found.loss.median / truth - 1))
        apart.append(abs(found.loss.median / same.loss.median - 1))
        assert found.target_tokens == pytest.approx(same.target_tokens)
    assert np.median(apart) < 0.004, apart
    assert np.median(error) < 0.04, error


def adam(lr: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """[steps] loss of Adam on a quadratic of 400 dims, whose gradients are mostly noise of size
    batch^-1/2. It falls about as the power -0.4 of the progress."""
    rng, dim = np.random.default_rng(0), np.arange(1, 401)
    curvature, w = dim**-2.0, np.ones((4, 400)) * dim**0.3
    m, v, found = np.zeros_like(w), np.zeros_like(w), []
    for t, (rate, size) in enumerate(zip(lr, batch, strict=True), start=1):
        noise = rng.standard_normal(w.shape) * np.sqrt(curvature / size)
        g = curvature * w + 3 * noise
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w = w - rate * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.98**t))
        found.append(0.5 * (curvature * w * w).sum(1).mean())
    return np.array(found)


def test_adam_itself_goes_so_far_in_a_step() -> None:
    """The premise: a run through a ramp has the loss of one with the large batch all along at the
    same sum of lr sqrt(batch); at the same sum of lr its loss is another."""
    batch = np.r_[np.ones(800), np.full(700, 16.0)]
    large = adam(np.full(900, 0.01), np.full(900, 16.0))
    for power in (0.0, 0.5):  # optim.batch_rule none, sqrt
        lr = 0.01 * (batch / 16) ** power
        plan = Schedule(lr=lr, tokens=np.cumsum(batch))
        loss = adam(lr, batch)
        for at in (780, 1100):  # Adam's averages and the noise take some steps to follow the batch
            same = large[round(plan.lr_sum(at)[0]) - 1]
            wrong = large[min(900, round(plan.lr[:at].sum())) - 1]
            assert loss[at - 1] == pytest.approx(same, rel=0.18), (power, at)
            assert loss[at - 1] > 1.4 * wrong, (power, at)
