"""Alarms on curves whose truth is known: seldom without a fault, soon with one."""

import math

import numpy as np
import pytest

from jaxmoe.forecast.alarm_benchmark import earlier, score_alarms
from jaxmoe.forecast.alarms import Band, Prior, ShiftWatch, SpikeWatch, beside, look_at, prior_of
from jaxmoe.forecast.benchmark_data import Curve
from jaxmoe.forecast.curve import Floats
from jaxmoe.forecast.hook_api import PathPoint

STEPS = np.arange(50.0, 3001, 50)
NOISE = 1e-3


def curve(seed: int, noise: float = NOISE, steps: Floats = STEPS) -> np.ndarray:
    """A power law over a floor."""
    rng = np.random.default_rng(seed)
    return (2.0 + 30.0 * steps**-0.5) * np.exp(noise * rng.normal(size=len(steps)))


def alarms(loss: np.ndarray, **given: object) -> list:
    watch = ShiftWatch(len(loss), **given)  # type: ignore[arg-type]
    return [a for s, value in zip(STEPS, loss, strict=False) for a in watch.add(int(s), value)[1]]


def model_draw(rng: np.random.Generator) -> np.ndarray:
    """Of the null itself: a slope that drifts, noise, no outliers."""
    x = np.log(STEPS[:24])
    level, slope, out = 1.5, -0.2, []
    for i in range(len(x)):
        dx = x[i] - x[i - 1] if i else 0.0
        slope += NOISE * math.sqrt(1e3 * dx) * rng.normal()
        level += slope * dx
        out.append(level + NOISE * rng.normal())
    return np.exp(np.array(out))


def test_the_evidence_is_a_fair_bet_where_nothing_happens() -> None:
    """Its mean is at most 1 at any time, so 100 is reached by 1 % of runs at most."""
    rng, last, reached = np.random.default_rng(7), [], 0
    for _ in range(120):
        loss = model_draw(rng)
        watch = ShiftWatch(len(loss), prior=Prior(scale=NOISE, freedom=30, drift=(3.0, 0.3)))
        seen = [watch.add(int(s), v)[0] for s, v in zip(STEPS, loss, strict=False)]
        last.append(math.exp(seen[-1].log_e))
        reached += max(one.log_e for one in seen) >= math.log(100)
    assert np.mean(last) < 1.3
    assert reached <= 4  # more than 4 of 120 at 1 %: chance 0.008


def test_healthy_runs_are_left_alone() -> None:
    assert sum(bool(alarms(curve(seed))) for seed in range(30)) <= 1


@pytest.mark.parametrize("size", [0.14, 0.35, 2.0])
def test_a_large_shift_of_any_size_is_found(size: float) -> None:
    for seed in range(3):
        found = alarms(curve(seed) * np.where(np.arange(60) >= 30, 1 + size, 1))
        assert found and STEPS[30] <= found[0].step <= STEPS[35]


@pytest.mark.parametrize(("size", "within"), [(0.01, 1), (0.03, 3)])
def test_a_permanent_shift_is_found_and_told(size: float, within: int) -> None:
    """Sooner where it is one of SIZES."""
    for seed in range(5):
        loss = curve(seed) * np.where(np.arange(60) >= 30, 1 + size, 1)
        (alarm, *_) = alarms(loss)
        assert alarm.kind == "shift"
        assert abs(alarm.since - STEPS[30]) <= 50 and alarm.step <= STEPS[30 + within]
        assert f"since step {alarm.since}" in str(alarm)


def test_a_fault_is_not_absorbed_by_the_fit() -> None:
    """Which is on its new path after a few observations, while the evidence stays."""
    loss = curve(3) * np.where(np.arange(60) >= 30, 1.01, 1)
    watch = ShiftWatch(60)
    seen = [watch.add(int(s), v)[0] for s, v in zip(STEPS, loss, strict=True)]
    assert seen[30].z > 4 and abs(np.mean([one.z for one in seen[35:50]])) < 1
    assert min(one.log_e for one in seen[32:50]) > math.log(100)
    assert seen[50].since == STEPS[30] and seen[50].size == 0.01


def test_a_slow_drift_is_found() -> None:
    rise = np.exp(0.003 * np.maximum(0, np.arange(60) - 30) ** 1.5)
    kinds = {a.kind for a in alarms(curve(0) * rise)}
    assert kinds & {"drift", "shift"}


def test_one_outlier_of_many_is_no_shift() -> None:
    steps = np.arange(10.0, 4001, 10)
    for times, wanted in ((1, []), (3, ["shift"])):
        loss = curve(0, steps=steps)
        loss[300 : 300 + times] *= 1.01
        watch = ShiftWatch(len(loss))
        found = [a.kind for s, v in zip(steps, loss, strict=True) for a in watch.add(int(s), v)[1]]
        assert found == wanted


def test_each_kind_is_raised_once() -> None:
    loss = (
        curve(1) * np.where(np.arange(60) >= 20, 1.02, 1) * np.where(np.arange(60) >= 40, 1.02, 1)
    )
    assert [a.kind for a in alarms(loss)].count("shift") == 1


def test_siblings_make_the_watch_sharper() -> None:
    """Twelve observations, a shift of the size of what a step brings: hidden without siblings."""
    steps = np.arange(250.0, 3001, 250)
    bend = np.exp(-0.05 * np.maximum(0, steps / 3000 - 0.45))  # the schedule's, which all have
    share = steps / steps[-1]

    def run(seed: int) -> np.ndarray:
        return curve(seed, 1.5e-3, steps) * bend

    siblings = [(share, run(seed)) for seed in range(1, 9)]
    prior = prior_of(siblings)
    assert 7e-4 < prior.scale < 3e-3
    base = beside(siblings)
    faulty = run(0) * np.where(share >= 0.5, 1.01, 1)
    alone, helped = ShiftWatch(12), ShiftWatch(12, prior=prior, baseline=lambda s: base(s / 3000))
    found = [
        [a.kind for s, v in zip(steps, faulty, strict=True) for a in watch.add(int(s), v)[1]]
        for watch in (alone, helped)
    ]
    assert found == [[], ["shift"]]


def test_spikes_of_one_step() -> None:
    rng = np.random.default_rng(0)
    watch = SpikeWatch("gradient norm")
    values = np.exp(0.1 * rng.normal(size=300))
    assert [a for i, v in enumerate(values) if (a := watch.add(i, float(v)))] == []
    alarm = watch.add(300, 5.0)
    assert alarm is not None and alarm.kind == "spike" and alarm.evidence["z"] > 8
    for step in range(301, 360):  # what is not finite does not become what is usual
        assert watch.add(step, math.inf if step % 2 else math.nan) is not None
    assert watch.add(360, 1.0) is None


def path() -> list[PathPoint]:
    each = {"q05": 2.9, "q25": 2.95, "median": 3.0, "q75": 3.05, "q95": 3.1}
    return [PathPoint(step=s, **each) for s in (100, 200, 300)]


@pytest.mark.parametrize(("loss", "kind"), [(3.3, "left the band"), (2.7, "too good")])
def test_two_losses_beyond_the_registered_band(loss: float, kind: str) -> None:
    band = Band(path())
    assert band.add(50, 9.0) == (0.0, None)  # before the path begins
    assert band.add(100, 3.05)[1] is None
    assert band.add(150, loss)[1] is None
    z, alarm = band.add(200, loss)
    assert alarm is not None and (alarm.kind, alarm.since) == (kind, 150)
    assert z == pytest.approx((loss - 3.0) / (0.2 / 3.29))
    assert band.add(250, loss)[1] is None  # raised once


def test_sides_of_the_band_do_not_add_up() -> None:
    band = Band(path())
    assert [band.add(s, v)[1] for s, v in ((100, 3.3), (150, 2.7), (200, 3.3))] == [None] * 3
    assert band.add(250, 2.7)[1] is None
    assert band.add(280, 2.7)[1] is not None  # nor do they cancel


def test_every_kind_says_where_to_look() -> None:
    for kind in ("spike", "shift", "drift", "left the band", "too good"):
        assert look_at(kind, 12)


def a_run(name: str, steps: Floats) -> Curve:
    loss = curve(int(name), steps=steps)
    share, rate = steps / steps[-1], np.ones(len(steps))
    return Curve(
        set="a",
        family="f",
        name=name,
        params_active=1.0,
        step=steps,
        share=share,
        rate=rate,
        loss=loss,
    )


def test_the_benchmark_counts_what_it_says() -> None:
    """A fault in runs that have an observation in time; runs without one are not tried."""
    sparse = np.array([300.0, 600, 900, 1350, 1800, 2400, 3000])
    curves = [a_run("0", STEPS), a_run("1", STEPS), a_run("2", sparse)]
    told = []
    scored = score_alarms(curves, earlier(curves, frozenset()), done=lambda: told.append(1))["a"]
    assert (scored.runs, scored.tried, scored.found, scored.flagged) == (3, 2, 1.0, 0.0)
    assert len(told) == 3
    assert [c.name for c in earlier(curves, frozenset("a"))(curves[2])] == ["0", "1"]
