"""The gate's verdicts on ladders whose gain is known at every scale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.ladder.advice import options
from jaxmoe.ladder.gate import Gate, gate, pair_up

DRAWS = 200
SMALLEST, STEP, TARGET = 1e17, 3.2, 1e23
ALLOWED = 16  # of 200 wrong at a level of 5 %: 97.5 % of binomial draws have at most as many
X0, XT = np.log(SMALLEST), np.log(TARGET)

Gain = Callable[[np.ndarray], np.ndarray]  # log of the effective compute ratio over log compute


def persistent(x: np.ndarray) -> np.ndarray:
    return 0 * x + np.log(1.25)


def vanishing(x: np.ndarray) -> np.ndarray:
    """40 % at the smallest rung, 22 % at the largest, a loss of 9 % at the target."""
    return np.log(1.4) * (1 - (x - X0) / (XT - X0 - 3))


def fading(x: np.ndarray) -> np.ndarray:
    """60 % at the smallest rung, 12 % at the largest, 1.5 % at the target."""
    return np.log(1.6) * np.exp(-(x - X0) / 4)


def none(x: np.ndarray) -> np.ndarray:
    return 0 * x


def rows_of(
    draw: int, gain: Gain, *, rungs: int = 6, seeds: int = 2, noise: float = 0.001
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of both ladders. Pairs share most of the seed's error; a rung has one of its own."""
    rng = np.random.default_rng(draw)
    rung = np.repeat(np.arange(rungs), seeds)
    x = X0 + np.log(STEP) * rung
    loss = lambda x: 1.75 + 0.9 * np.exp(-0.155 * (x - np.log(1.2e20)))  # noqa: E731
    shared = 1 + 0.002 * rng.standard_normal(x.size)
    tuned = (1 + 0.0003 * rng.standard_normal(rungs))[rung]
    own = lambda: 1 + noise / np.sqrt(2) * rng.standard_normal(x.size)  # noqa: E731
    losses = (loss(x) * shared * own(), loss(x + gain(x)) * shared * tuned * own())
    same = dict.fromkeys(("set_fingerprint", "train_fingerprint", "tokenizer_fingerprint"), "a")

    def ladder(values: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                **same,
                "rung": int(k),
                "seed": i % seeds,
                "params_active": float(np.sqrt(np.exp(v) / 120)),
                "tokens": float(np.sqrt(np.exp(v) / 120) * 20),
                "flops": float(np.exp(v)),
                "loss": float(y),
            }
            for i, (k, v, y) in enumerate(zip(rung, x, values, strict=True))
        ]

    return ladder(losses[0]), ladder(losses[1])


def answered(draw: int, gain: Gain, target: float = TARGET, **how: Any) -> Gate:
    worth = how.pop("worth", 1.0)
    return gate(pair_up(*rows_of(draw, gain, **how)), target, worth=worth)


def verdicts(gain: Gain) -> dict[str, int]:
    found = [answered(draw, gain).verdict for draw in range(DRAWS)]
    return {word: found.count(word) for word in ("keep", "drop", "undecided")}


@pytest.mark.parametrize(
    ("gain", "wrong", "least"),
    [(persistent, "drop", ("keep", 150)), (vanishing, "keep", ("undecided", 0))],
    ids=["persistent", "vanishing"],
)
def test_verdicts_are_wrong_no_more_often_than_stated(
    gain: Gain, wrong: str, least: tuple[str, int]
):
    """Over 200 draws; and a gate that never dared would be of no use."""
    found = verdicts(gain)
    assert found[wrong] <= ALLOWED, found
    assert found[least[0]] >= least[1], found


def test_a_change_without_effect_is_neither_kept_nor_dropped_beyond_the_level():
    found = verdicts(none)
    assert found["keep"] <= ALLOWED and found["drop"] <= ALLOWED, found


def test_a_gain_that_fades_is_dropped():
    """It falls from 60 to 12 % over the rungs: what is left at the target is under 2 %."""
    found = [answered(draw, fading).verdict for draw in range(20)]
    assert found.count("drop") >= 15 and "keep" not in found, found


def test_the_interval_at_the_target_covers():
    for gain in (persistent, none):
        truth = float(np.exp(gain(np.array(XT))))
        found = [answered(draw, gain).projection for draw in range(40)]
        assert sum(low <= truth <= high for low, _, high in found) >= 34


def test_ratios_of_rungs_are_the_gains_there():
    """Almost without noise. Of the smallest rung the law's slope is known to a quarter only."""
    found = answered(3, vanishing, noise=1e-5, rungs=7, seeds=1)
    truth = np.exp(vanishing(np.log(found.flops)))
    np.testing.assert_allclose(found.measured[1][1:], truth[1:], rtol=0.03)
    np.testing.assert_allclose(np.log(found.measured[1][0]), np.log(truth[0]), rtol=0.3)


def test_a_candidate_that_costs_more_pays_for_it():
    """Equal losses at 1.3 times the compute: a ratio of 1 / 1.3."""
    first, second = rows_of(0, none, noise=1e-4)
    second = [{**row, "flops": 1.3 * row["flops"]} for row in second]
    found = gate(pair_up(first, second), TARGET)
    np.testing.assert_allclose(found.projection[1], 1 / 1.3, rtol=0.03)
    assert found.verdict == "drop"


def test_worth_is_what_must_be_gained():
    for worth, wanted in ((1.0, "keep"), (1.25, "undecided"), (1.6, "drop")):
        assert answered(1, persistent, noise=5e-4, worth=worth).verdict == wanted


def test_further_targets_are_less_sure():
    width = []
    for target in (1e20, 1e22, 1e24):
        low, _, high = answered(0, persistent, target).projection
        width.append(high / low)
    assert width == sorted(width) and width[2] > 1.15 * width[0]


def test_only_pairs_of_one_seed_and_rung_count_and_seeds_tell_the_noise():
    first, second = rows_of(2, persistent, seeds=3)
    less = [row for row in second if (row["rung"], row["seed"]) not in ((0, 0), (5, 2))]
    pairs = pair_up(first, less)
    assert len(pairs.rung) == 16 and len(pairs.law) == 18
    assert gate(pairs, TARGET).pairs.tolist() == [2, 3, 3, 3, 3, 2]
    noises = [answered(4, none, seeds=4, noise=n).noise for n in (0.0005, 0.002, 0.008)]
    np.testing.assert_allclose(noises, (0.0005, 0.002, 0.008), rtol=0.6)


def test_options_say_what_another_rung_is_worth():
    """The expected spread is that of the ladder once it has it, and more seeds give less spread."""
    found = answered(0, persistent, noise=0.003, rungs=5)
    named = {one.what.split(" (")[0]: one for one in options(found)}
    assert all(0 <= one.chance <= 1 and one.flops > 0 for one in named.values())
    before = found.line.at(float(np.log(TARGET / found.flops.max()))).moments()[1][0]
    seeds = [named[f"{n} more seed{'s' * (n > 1)} at every rung"].sd for n in (1, 2, 4, 8)]
    assert seeds == sorted(seeds, reverse=True) and seeds[0] < before
    cost = 2 * 2 * found.flops.max() * STEP
    np.testing.assert_allclose(named["1 larger rung"].flops, cost, rtol=1e-6)
    after = []
    for draw in range(12):
        longer = answered(draw, persistent, noise=0.003, rungs=6)
        after.append(longer.line.at(float(np.log(TARGET / longer.flops.max()))).moments()[1][0])
    np.testing.assert_allclose(named["1 larger rung"].sd, np.median(after), rtol=0.35)


def test_gates_refuse_what_cannot_be_compared():
    first, second = rows_of(0, none)
    other = [{**row, "set_fingerprint": "b"} for row in second]
    with pytest.raises(UserError, match="set_fingerprint: a and b"):
        pair_up(first, other)
    with pytest.raises(UserError, match="2 rungs"):
        pair_up(first, [row for row in second if row["rung"] < 2])
    with pytest.raises(UserError, match="--at"):
        gate(pair_up(first, second), float("inf"))
    with pytest.raises(UserError, match="--level"):
        gate(pair_up(first, second), TARGET, level=0.4)
