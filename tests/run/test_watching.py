"""Alarms in the loop: told once, acted on as the config says, and the same after a resume."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from processes import events
from small import small

from jaxmoe.config import Config, DataConfig
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.run import parts
from jaxmoe.run.loop import Alarmed, Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.watching import Watching

FAULT = 14  # step of the evaluation from which on losses are too high


def config(on_alarm: str = "log") -> Config:
    forecast = replace(small().forecast, on_alarm=on_alarm)
    return replace(small(), forecast=forecast)


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    data: DataConfig = replace(small().data, cache=str(text_cache))
    return prepare(data, small().model.vocab_size)


def fall(step: int) -> float:
    return (2 + 3 * step**-0.5) * math.exp(0.1 if step >= FAULT else 0.0)


def told(watching: Watching, steps: range) -> list[str]:
    return [alarm.kind for step in steps for alarm in watching.after_eval(step, fall(step))]


def test_a_resumed_watch_goes_on_as_if_nothing_had_been() -> None:
    whole = Watching(config("stop"))
    assert told(whole, range(4, 25, 2)) == ["shift"]
    assert whole.acts() is not None and whole.acts() is None
    for cut in (10, 20):  # before and after the fault
        first, second = Watching(config("stop")), Watching(config("stop"))
        before = told(first, range(4, cut, 2))
        rng = np.random.default_rng(0)
        for step in range(1, 20):
            first.after_step(step, 3 + 0.01 * rng.random(), 1 + 0.1 * rng.random())
        second.restore(first.state(), [(step, fall(step)) for step in range(4, cut, 2)])
        assert second.acts() is None  # it was acted on before the kill
        assert before + told(second, range(cut, 25, 2)) == ["shift"]
        assert [a.kind for a in second.after_step(20, 9.0, 1.05)] == ["spike"]


def test_the_first_registered_path_stays() -> None:
    each = dict.fromkeys(("q25", "median", "q75"), 3.0) | {"q05": 2.9, "q95": 3.1}
    watching = Watching(config())
    watching.freeze([{"step": step, **each} for step in (4, 24)])
    watching.freeze([{"step": step, **dict.fromkeys(each, 9.0)} for step in (4, 24)])
    assert watching.after_eval(6, 3.05) == [] and watching.residual == pytest.approx(0.8225)
    found = [alarm.kind for step in (8, 10) for alarm in watching.after_eval(step, 4.0)]
    assert "left the band" in found


def test_an_alarm_saves_and_ends_the_run_which_then_goes_on(
    corpus: Corpus, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses of a healthy run, then of one that is 10 % off."""
    evaluated = parts.evaluate_sets
    trainer: Trainer

    def faulty(sets: Any, sums: Any) -> Any:
        step = trainer.plan.step_of(trainer.tokens)
        lines = evaluated(sets, sums)
        return [{**line, "nll": fall(max(1, step))} for line in lines]

    monkeypatch.setattr(parts, "evaluate_sets", faulty)
    stopping = replace(config("stop"), checkpoint=replace(small().checkpoint, every=100))
    trainer = Trainer(stopping, mesh, corpus, tmp_path / "run", Silent(), 1e12)
    state = trainer.prepare()
    with pytest.raises(Alarmed, match=f"stopped at step {FAULT} by an alarm: shift since step"):
        trainer.run(state)
    alarm = events(tmp_path / "run", "alarm")[0]
    assert alarm["step"] == FAULT and "look at" in alarm["why"]
    trainer = Trainer(stopping, mesh, corpus, tmp_path / "run", Silent(), 1e12)
    state = trainer.prepare()
    assert int(state.step) == FAULT
    assert trainer.run(state).step == stopping.train.steps
    told = [event["why"].split(" since")[0] for event in events(tmp_path / "run", "alarm")]
    assert told == ["shift", "left the band"]  # the band is told, and not acted on
