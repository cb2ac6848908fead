"""Ladder records: comparable or refused, hashed, and a target's forecast registered from them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ladder_cases import STEPS, recipe

from jaxmoe.errors import UserError
from jaxmoe.forecast import Run
from jaxmoe.forecast.ladder import COMMON, Ladder, Target, read_ladder, record_sha256
from jaxmoe.forecast.ladder_path import LENGTH, _integrated_slope
from jaxmoe.forecast.ladder_register import forecast_target, register_target
from jaxmoe.forecast.register import append, read, verify

SIZES = [2e6 * 2**i for i in range(6)]
BIG = 2e8
TOKENS = STEPS * 1e6
IDENTITY = {"set": "s", "set_fingerprint": "sf", "train_fingerprint": "t"}
IDENTITY |= {"tokenizer_fingerprint": "k"}
EVALS = tuple(range(10, STEPS + 1, 10))


def row_of(run: Run, rung: int, **changes: Any) -> dict[str, Any]:
    curve = [
        [int(s), float(run.schedule.tokens[s - 1]), float(v)]
        for s, v in zip(run.steps, run.loss, strict=True)
    ]
    base = {"kind": "rung", "family": "f", "rung": rung, "seed": 0, **IDENTITY}
    base |= {"recipe_fingerprint": "r", "config_fingerprint": f"c{rung}"}
    base |= {"params_active": run.params_active, "tokens": TOKENS, "loss": float(run.loss[-1])}
    return {**base, "finished": "2026-11-01T00:00:00+00:00", "curve": curve, **changes}


def rows(seed: int = 0) -> list[dict[str, Any]]:
    return [row_of(run, rung) for rung, run in enumerate(recipe(SIZES, seed=seed))]


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return path


def big(**changes: Any) -> Target:
    given: dict[str, Any] = {"name": "big", "config": "cb", "run": "rb"}
    given |= {"numbers": {"params_active": BIG, "tokens": TOKENS}}
    given |= {"identity": {**IDENTITY, "leaking": 0}, "recipe_fingerprint": "r"}
    given |= {"schedule": recipe([BIG])[0].schedule, "eval_steps": EVALS}
    return Target(**{**given, **changes})


@pytest.fixture
def ladder(tmp_path: Path) -> Ladder:
    return read_ladder([write(tmp_path / "ladder", rows())])


def test_records_become_points_curves_and_hashes(ladder: Ladder) -> None:
    assert ladder.points.params_active.tolist() == SIZES
    assert [run.params_active for run in ladder.siblings] == SIZES
    assert all(run.steps[-1] == run.schedule.steps == STEPS for run in ladder.siblings)
    shuffled = dict(reversed(list(rows()[2].items())))
    canonical = json.dumps(shuffled, sort_keys=True, separators=(",", ":"))
    assert ladder.hashes[2] == hashlib.sha256(canonical.encode()).hexdigest()
    assert len(set(ladder.hashes)) == 6


def test_a_later_line_of_a_point_stands_and_a_diverged_run_is_left_out(tmp_path: Path) -> None:
    again = {**rows()[1], "loss": 3.9, "curve": None}
    other_horizon = {**rows()[1], "loss": 3.95, "tokens": 2e8, "curve": None}
    diverged = {**rows()[0], "seed": 1, "loss": None}
    path = write(tmp_path, [*rows(), again, other_horizon, diverged])
    found = read_ladder([path])
    assert len(found.points) == 7 and found.diverged == 1
    assert sorted(found.points.loss[found.points.params_active == SIZES[1]]) == [3.9, 3.95]
    assert len(found.siblings) == 5


@pytest.mark.parametrize("key", COMMON)
def test_a_mixture_is_refused_by_key_with_both_values(tmp_path: Path, key: str) -> None:
    records = rows()
    records[3][key] = "other"
    with pytest.raises(UserError) as refused:
        read_ladder([write(tmp_path, records)])
    words = str(refused.value)
    assert f"line 4: {key} is 'other', and {rows()[0][key]!r} in" in words and "line 1" in words


@pytest.mark.parametrize("key", COMMON)
def test_a_target_of_other_text_or_recipe_is_refused(ladder: Ladder, key: str) -> None:
    target = big()
    if key == "recipe_fingerprint":
        target = big(recipe_fingerprint="other")
    else:
        target = big(identity={**target.identity, key: "other"})
    message = f"{key}: the records have {ladder.common[key]!r} and the target 'other'"
    with pytest.raises(UserError, match=message):
        forecast_target(ladder, target)


def curved(change: Callable[[list[list[float]]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda row: change(row["curve"])


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "line 2 has no finished": lambda row: row.pop("finished"),
    "line 2: finished: time='today'": lambda row: row.update(finished="today"),
    "line 2: kind='forecast'": lambda row: row.update(kind="forecast"),
    "line 2: tokens=0": lambda row: row.update(tokens=0),
    "line 2: loss='3'": lambda row: row.update(loss="3"),
    "line 2: loss=-1": lambda row: row.update(loss=-1),
    "line 2: curve must be rising": curved(lambda curve: curve.reverse()),
    "line 2: its curve ends at tokens": curved(lambda curve: curve.pop()),
    "line 2: its curve ends at loss": lambda row: row.update(loss=row["loss"] * (1 + 1e-6)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_damaged_record_is_named(tmp_path: Path, message: str) -> None:
    records = rows()
    BAD[message](records[1])
    with pytest.raises(UserError, match=message):
        read_ladder([write(tmp_path, records)])


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_ladder([tmp_path / "none.jsonl"])
    with pytest.raises(UserError, match="no runs"):
        read_ladder([write(tmp_path, [])])
    with pytest.raises(UserError, match="no plain JSON"):
        record_sha256({"loss": float("nan")})


def test_the_path_and_the_end_cover_the_truth(tmp_path: Path) -> None:
    """12 ladders: the share of the target's evals within the registered 90 % band."""
    inside, ends = [], []
    for seed in range(12):
        truth = recipe([*SIZES, BIG], seed=seed)[-1]
        made = forecast_target(read_ladder([write(tmp_path, rows(seed))]), big())
        loss = dict(zip(truth.steps.tolist(), truth.loss, strict=True))
        assert [p.step for p in made.path] == [s for s in EVALS if s >= 10]
        inside.append(np.mean([p.q05 <= loss[p.step] <= p.q95 for p in made.path]))
        ends.append(made.loss.median / truth.loss[-1] - 1)
    assert 0.8 <= np.mean(inside)
    assert np.max(np.abs(ends)) < 0.02
    first, last = ((p.q95 - p.q05) / p.median for p in (made.path[0], made.path[-1]))
    assert 1.5 * last < first < 0.15  # the regression's own error, and yet it says something


def growing(run: Run, rung: int) -> dict[str, Any]:
    """Compute as the square of the parameters, so that the runs span enough of it."""
    return row_of(run, rung, flops=6e2 * float(run.params_active or 0) ** 2)


def test_a_steep_trend_over_small_runs_is_not_carried_to_large_ones(tmp_path: Path) -> None:
    """Sizes over one e-fold, each falling further than the one before: three e-folds on, the rest
    of the way is that of the largest and a little more, not the line through all."""
    made = []
    for k, size in enumerate(BIG * np.exp([-4.3, -3.9, -3.5, -3.1])):
        run = recipe([float(size)], seed=k, every=20)[0]
        share = run.steps / STEPS
        loss = 3.0 * np.exp(0.25 * np.exp(0.35 * (k / 3 - 1)) * (1 - share))
        made.append(replace(run, loss=loss * (1 + 1e-4 * np.sin(np.arange(loss.size)))))
    found = read_ladder([write(tmp_path, [growing(run, k) for k, run in enumerate(made)])])
    path = forecast_target(found, big()).path
    half = next(p for p in path if p.step == STEPS // 2)
    fall = float(np.log(half.median / path[-1].median))
    largest = 0.25 * 0.5
    assert largest < fall < 2.2 * largest  # by the line: exp(0.35 * 3.1 / 0.9) = 3.3 times
    assert np.log(half.q05 / path[-1].q05) < 1.4 * largest  # the band holds no more growth at all


def test_the_slope_between_sizes_is_forgotten_as_stated() -> None:
    """Against the double integral of exp(-|u - v| / LENGTH)."""
    places = np.array([-1.5, -0.4, 0.0, 0.7, 2.5])
    found = _integrated_slope(places)
    grid = (np.arange(2000) + 0.5) / 2000
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            u, v = np.meshgrid(a * grid, b * grid)
            wanted = a * b * np.mean(np.exp(-abs(u - v) / LENGTH))
            assert found[i, j] == pytest.approx(wanted, rel=2e-3, abs=1e-12)


def test_a_ladder_without_curves_registers_the_end_alone(tmp_path: Path) -> None:
    bare = [{**row, "curve": None} for row in rows()]
    found = read_ladder([write(tmp_path, bare)])
    made = forecast_target(found, big())
    assert [point.step for point in made.path] == [STEPS]
    assert made.loss == forecast_target(read_ladder([write(tmp_path, rows())]), big()).loss


def test_the_line_has_all_that_it_rests_on(ladder: Ladder, tmp_path: Path) -> None:
    line = register_target(ladder, big(), tmp_path / "run")
    assert (line["step"], line["cutoff_step"], line["horizon_steps"]) == (0, 0, STEPS)
    assert [s["sha256"] for s in line["siblings"]] == list(ladder.hashes)
    assert line["schedule"]["sha256"] == big().schedule.sha256
    assert sum(line["laws"].values()) == pytest.approx(1)
    needed = {"previous", "time", "tokens", "config", "code", "set_fingerprint", "metric", "path"}
    assert needed <= line.keys() and line["target"]["params_active"] == BIG
    path = tmp_path / "run" / "forecasts.jsonl"
    assert read(path) == [line] and verify(path) == []


def test_every_field_of_a_registered_line_is_guarded(ladder: Ladder, tmp_path: Path) -> None:
    register_target(ladder, big(), tmp_path / "run")
    path = tmp_path / "run" / "forecasts.jsonl"
    original = json.loads(path.read_bytes())
    for name in original:
        forged = {**original, name: "edited"}
        path.write_text(json.dumps(forged, separators=(",", ":")) + "\n")
        assert verify(path), name
    moved = json.loads(json.dumps(original))
    moved["siblings"][1]["curve"][0][1] += 1e-9
    path.write_text(json.dumps(moved, separators=(",", ":")) + "\n")
    assert verify(path)


def test_look_ahead_is_refused(ladder: Ladder, tmp_path: Path) -> None:
    early = datetime(2026, 10, 1, tzinfo=UTC)
    with pytest.raises(UserError, match="finished at 2026-11-01T00:00:00"):
        register_target(ladder, big(), tmp_path / "run", now=early)
    with pytest.raises(UserError, match="hold the target's own run"):
        register_target(ladder, big(config="c3"), tmp_path / "run")
    # Whoever writes the line by hand meets the same.
    line = register_target(ladder, big(), tmp_path / "other")
    plain = {k: v for k, v in line.items() if k not in ("index", "previous")}
    with pytest.raises(UserError, match="after this forecast of .*: look-ahead"):
        append(tmp_path / "run" / "forecasts.jsonl", {**plain, "time": early.isoformat()})
    assert not (tmp_path / "run" / "forecasts.jsonl").exists()


def evals_until(folder: Path, step: int, run: Run) -> None:
    rows = [
        {"step": int(s), "tokens": 0, "set": "s", "set_fingerprint": "sf", "nll": float(v)}
        for s, v in zip(run.steps, run.loss, strict=True)
        if s <= step
    ]
    folder.mkdir(exist_ok=True)
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_a_run_that_goes_on_only_the_rest_is_registered(ladder: Ladder, tmp_path: Path) -> None:
    truth = recipe([*SIZES, BIG])[-1]
    folder = tmp_path / "run"
    first = register_target(ladder, big(), folder)
    evals_until(folder, 120, truth)
    line = register_target(ladder, big(), folder)
    assert (line["cutoff_step"], line["law"], line["evals_lines"]) == (120, "siblings", 12)
    assert line["path"][0]["step"] == 130
    assert abs(line["loss"]["median"] / truth.loss[-1] - 1) < 0.01
    width = line["loss"]["q95"] - line["loss"]["q05"]
    assert width < first["loss"]["q95"] - first["loss"]["q05"]
    assert verify(folder / "forecasts.jsonl") == []
    for old in (first, line):  # what was known at step 0 or 120 can no longer be said
        evals_until(folder, 200, truth)
        plain = {k: v for k, v in old.items() if k not in ("index", "previous", "evals_lines")}
        with pytest.raises(UserError, match="eval at step 200, after this forecast's cut-off"):
            append(folder / "forecasts.jsonl", plain)
    evals_until(folder, STEPS, truth)
    with pytest.raises(UserError, match="has ended"):
        register_target(ladder, big(), folder)


def test_a_forecast_of_before_the_start_is_older_than_the_run(
    ladder: Ladder, tmp_path: Path
) -> None:
    line = register_target(ladder, big(), tmp_path)
    made = datetime.fromisoformat(line["time"])
    for seconds, sound in ((1, True), (-1, False)):
        began = (made + timedelta(seconds=seconds)).isoformat()
        event = {"time": began, "step": 0, "what": "start", "why": ""}
        (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
        problems = verify(tmp_path / "forecasts.jsonl")
        assert ([p.line for p in problems] == []) == sound
        assert sound or "before the run, which began at" in str(problems[0])


def test_another_schedule_shows(ladder: Ladder, tmp_path: Path) -> None:
    register_target(ladder, big(), tmp_path)
    plan = {"lr": big().schedule.lr.tolist(), "tokens_per_step": 1e6}
    file, path = tmp_path / "schedule.json", tmp_path / "forecasts.jsonl"
    file.write_text(json.dumps(plan))
    assert verify(path) == []
    rounded = [float(np.float32(rate)) for rate in plan["lr"]]  # as another device may
    file.write_text(json.dumps({**plan, "lr": rounded}))
    assert verify(path) == []
    for at in (0, 199, STEPS - 1):
        edited = [rate + (0.01 if step == at else 0) for step, rate in enumerate(plan["lr"])]
        file.write_text(json.dumps({**plan, "lr": edited}))
        assert "schedule.json is not" in str(verify(path)[0]), at
    file.write_text("{")
    assert "schedule.json is not" in str(verify(path)[0])


def test_a_correction_is_a_new_line_with_its_reason(ladder: Ladder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no forecast from a ladder at step 0 to correct"):
        register_target(ladder, big(), tmp_path, correct="a rung was wrong")
    register_target(ladder, big(), tmp_path)
    with pytest.raises(UserError, match="line 1 is the forecast .* --correct REASON"):
        register_target(ladder, big(), tmp_path)
    fewer = read_ladder([write(tmp_path / "ladder", rows()[:-1])])
    line = register_target(fewer, big(), tmp_path, correct="rung 5 was mis-tuned")
    assert (line["corrects"], line["reason"], line["index"]) == (0, "rung 5 was mis-tuned", 1)
    path = tmp_path / "forecasts.jsonl"
    assert len(read(path)) == 2 and verify(path) == []
    with pytest.raises(UserError, match="a correction needs a reason"):
        register_target(ladder, big(), tmp_path, correct=" ")
    with pytest.raises(UserError, match="forecast of a run with another config"):
        register_target(ladder, big(run="other"), tmp_path)


def test_too_thin_or_too_small_is_refused(ladder: Ladder, tmp_path: Path) -> None:
    three = read_ladder([write(tmp_path, rows()[:3])])
    with pytest.raises(UserError, match="3 distinct compute budgets"):
        register_target(three, big(), tmp_path)
    small = big(numbers={"params_active": SIZES[0], "tokens": TOKENS})
    with pytest.raises(UserError, match="of the largest run's compute"):
        register_target(ladder, small, tmp_path)
    assert not (tmp_path / "forecasts.jsonl").exists()


def test_runs_of_several_shapes_of_experts_get_a_law_of_experts(tmp_path: Path) -> None:
    records = []
    for experts in (4, 16):
        for rung, run in enumerate(recipe(SIZES)):
            loss = float(run.loss[-1]) * experts**-0.03
            shape = {"experts": experts, "top_k": 2, "router": "softmax", "family": f"e{experts}"}
            shape |= {"params_total": SIZES[rung] * experts / 2, "curve": None}
            records.append(row_of(run, rung, loss=loss, **shape))
    found = read_ladder([write(tmp_path, records)])
    numbers = {**big().numbers, "experts": 16, "top_k": 2, "router": "softmax"}
    numbers["params_total"] = BIG * 8
    made = forecast_target(found, big(numbers=numbers))
    assert made.law == "stack over experts" and made.misfits == ()
    alike = read_ladder([write(tmp_path, records[6:])])
    assert forecast_target(alike, big(numbers=numbers)).law == "stack over compute"
