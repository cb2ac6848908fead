"""Forecasts beside an earlier ladder whose larger runs are known."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from test_ladder import BIG, SIZES, STEPS, TOKENS, big, row_of, rows, write

from jaxmoe.errors import UserError
from jaxmoe.forecast.beside import Beside
from jaxmoe.forecast.ladder import read_ladder
from jaxmoe.forecast.ladder_register import forecast_target, register_target
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.register import append, verify
from jaxmoe.forecast.stack import Stack

RUNGS = 3e6 * 1.5 ** np.arange(5)
LARGE = RUNGS[-1] * 18  # 320 times the compute at 20 tokens a parameter
DRAWS = 40

Law = Callable[[np.ndarray], np.ndarray]


def base(n: np.ndarray) -> np.ndarray:
    """Of the earlier ladder: it bends where no law expects it to, between small and large runs."""
    x = np.log(n / 3e6)
    return (1.8 + 380 * n**-0.33 + 450 * (20 * n) ** -0.3) * (1 - 0.06 / (1 + np.exp(2 - x)))


def other_text(n: np.ndarray) -> np.ndarray:
    """A shifted power law of the earlier one (arXiv:2411.12925, equation 1)."""
    return 0.8 + 0.75 * (base(n) - 0.9) ** 1.06


def changed(n: np.ndarray) -> np.ndarray:
    """A change of the recipe that is worth 3 % at the smallest rung and 2 % at the target."""
    return base(n) * (0.97 + 0.0024 * np.log(n / 3e6))


def points(law: Law, sizes: np.ndarray, seeds: int, draw: int) -> Points:
    rng = np.random.default_rng(draw)
    n = np.repeat(sizes, seeds)
    return Points.of(n, 20 * n, law(n) * (1 + 0.003 * rng.standard_normal(n.size)))


@pytest.mark.parametrize(("law", "half"), [(other_text, 0.032), (changed, 0.018)])
def test_the_target_is_covered_and_sharper_than_by_the_ladder_alone(law: Law, half: float) -> None:
    target = Points.of(LARGE, 20 * LARGE)
    truth = float(law(np.array([LARGE]))[0])
    inside, errors, halves, alone = 0, [], [], []
    for draw in range(DRAWS):
        earlier = points(base, np.append(RUNGS, RUNGS[-1] * np.array([3.0, 8.0, 18.0])), 2, draw)
        ladder = points(law, RUNGS, 4, 1000 + draw)
        low, middle, high = (
            Beside(earlier=earlier).fit(ladder).mixture(target).quantile([0.05, 0.5, 0.95])[:, 0]
        )
        inside += low <= truth <= high
        errors.append(middle / truth - 1)
        alone.append(float(Stack().fit(ladder).predict(target)[0]) / truth - 1)
        halves.append((high - low) / 2 / middle)
    assert inside >= 0.85 * DRAWS
    assert np.median(halves) < half
    assert np.median(np.abs(errors)) < 0.9 * np.median(np.abs(alone))


def test_runs_of_one_seed_are_pairs_and_share_their_luck() -> None:
    """1 % of the loss by the seed, 0.2 % of each run's own: seeds cancel where they are known."""
    target = Points.of(LARGE, 20 * LARGE)
    truth = float(changed(np.array([LARGE]))[0])
    widths, inside = [], 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        n, seed = np.repeat(RUNGS, 4), np.tile(np.arange(4), RUNGS.size)
        luck = 1 + 0.01 * rng.standard_normal(n.size)
        runs = [
            law(n) * luck * (1 + 0.002 * rng.standard_normal(n.size)) for law in (base, changed)
        ]
        top = RUNGS[-1] * np.array([3.0, 8.0, 18.0])
        size = np.append(n, top)
        loss = np.append(runs[0], base(top))
        width = []
        for known in (seed, None):
            theirs = None if known is None else np.append(known, [0, 0, 0])
            earlier = Points.of(size, 20 * size, loss, seed=theirs)
            fit = Beside(earlier=earlier).fit(Points.of(n, 20 * n, runs[1], seed=known))
            low, _, high = fit.ratio(target).quantile([0.05, 0.5, 0.95])[:, 0]
            width.append(high - low)
            if known is not None:
                wanted = np.log(truth / float(fit.law.predict(target)[0]))
                inside += low <= wanted <= high
        widths.append(width)
    paired, apart = np.median(widths, axis=0)
    assert paired < 0.6 * apart
    assert inside >= 0.85 * DRAWS


def test_ratios_are_those_of_runs_of_one_size() -> None:
    earlier, ladder = points(base, RUNGS, 6, 0), points(changed, RUNGS[1:4] * 1.02, 6, 1)
    fit = Beside(earlier=earlier).fit(ladder)
    n = RUNGS[1:4] * 1.02
    np.testing.assert_allclose(fit.ratios[1], changed(n) / base(n), rtol=0.004)
    assert fit.runs == 18 and np.all(fit.ratios[0] < fit.ratios[2])


def test_too_few_common_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="2 sizes are in both ladders"):
        Beside(earlier=points(base, RUNGS, 1, 0)).fit(points(base, RUNGS[:2], 3, 1))
    with pytest.raises(UserError, match="0 sizes are in both ladders"):
        Beside(earlier=points(base, RUNGS, 1, 0)).fit(points(base, RUNGS * 1.2, 3, 1))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A ladder, and an earlier one on other text that goes on to larger runs."""
    own = rows()
    higher = [
        {**row_of_size(row, k), "set": "old", "set_fingerprint": "of", "train_fingerprint": "ot"}
        for k, row in enumerate([*rows(seed=1), *larger()])
    ]
    return write(tmp_path / "own", own), write(tmp_path / "earlier", higher)


def row_of_size(row: dict[str, object], k: int) -> dict[str, object]:
    return {**row, "rung": k, "config_fingerprint": f"e{k}", "recipe_fingerprint": "old"}


def larger() -> list[dict[str, object]]:
    from ladder_cases import recipe

    runs = recipe([SIZES[-1] * 2**i for i in range(1, 3)], seed=2)
    return [row_of(run, 6 + i) for i, run in enumerate(runs)]


def test_the_way_there_is_told_by_the_earlier_curves_too(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Larger runs are nearer to the target: without their curves the band is wider, at one end."""
    ladder, earlier = (read_ladder([place]) for place in places)
    bare = read_ladder([write(tmp_path / "b", [{**row, "curve": None} for row in earlier.rows])])
    known, unknown = (forecast_target(ladder, big(), earlier=one) for one in (earlier, bare))
    assert known.loss == unknown.loss
    half = [
        next(p.q95 - p.q05 for p in made.path if p.step == STEPS // 2) for made in (known, unknown)
    ]
    assert half[0] < 0.95 * half[1]


def test_the_line_names_the_earlier_runs_and_is_guarded(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    ladder, earlier = (read_ladder([place]) for place in places)
    line = register_target(ladder, big(), tmp_path / "run", earlier=earlier)
    assert line["law"] == Beside.name and sum(line["laws"].values()) == pytest.approx(1)
    assert [one["sha256"] for one in line["earlier"]] == list(earlier.hashes)
    assert {one["set_fingerprint"] for one in line["earlier"]} == {"of"}
    assert [s["sha256"] for s in line["siblings"]] == list(ladder.hashes)
    assert line["loss"]["median"] != forecast_target(ladder, big()).loss.median
    path = tmp_path / "run" / "forecasts.jsonl"
    assert verify(path) == []
    text = path.read_text()
    path.write_text(text.replace('"set":"old"', '"set":"new"'))
    assert verify(path)


def test_ladders_of_several_shapes_of_experts_are_refused(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    mixed = [{**row, "experts": 1 + 7 * (k % 2), "top_k": 1} for k, row in enumerate(rows(seed=1))]
    ladder = read_ladder([places[0]])
    earlier = read_ladder([write(tmp_path / "mixed", mixed)])
    with pytest.raises(UserError, match="give ladders of one shape each"):
        forecast_target(ladder, big(), earlier=earlier)


def test_earlier_runs_are_earlier_and_not_the_target(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    ladder, earlier = (read_ladder([place]) for place in places)
    with pytest.raises(UserError, match="hold the target's own run"):
        register_target(ladder, big(config="e7"), tmp_path / "run", earlier=earlier)
    line = register_target(ladder, big(), tmp_path / "run", earlier=earlier)
    plain = {k: v for k, v in line.items() if k not in ("index", "previous")}
    plain["earlier"] = [{**plain["earlier"][0], "finished": "2099-01-01T00:00:00+00:00"}]
    now = datetime.now(UTC).isoformat()
    with pytest.raises(UserError, match="earlier: .* finished at 2099.*look-ahead"):
        append(tmp_path / "other" / "forecasts.jsonl", {**plain, "time": now})


def test_sizes_are_compared_by_parameters_and_by_tokens() -> None:
    """Runs of the same compute but other shares of it are no pair."""
    n = RUNGS
    wide = Points.of(n * 1.5, 20 * n / 1.5, base(n))
    with pytest.raises(UserError, match="0 sizes"):
        Beside(earlier=wide).fit(Points.of(n, 20 * n, base(n)))
    assert BIG > SIZES[-1] and TOKENS > 0
