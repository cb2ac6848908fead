"""A forecast from before the start, the loop's own beside it, and the register that a checkpoint
knows: the same whatever the worker's speed, whenever a kill comes."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from processes import TIMED, lines
from small import small

from jaxmoe.config import Config, DataConfig
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.errors import UserError
from jaxmoe.forecast.__main__ import main as forecast
from jaxmoe.forecast.ladder import read_ladder
from jaxmoe.forecast.ladder_register import register_target
from jaxmoe.forecast.register import append, read, verify
from jaxmoe.run import forecasting, record
from jaxmoe.run import watching as module
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.target import identity_of, numbers_of, target_of
from jaxmoe.run.watching import Watching

SMALL = Path(__file__).with_name("small.py")
STEPS = small().train.steps


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    data: DataConfig = replace(small().data, cache=str(text_cache))
    return prepare(data, small().model.vocab_size)


def fall(step: float, size: float) -> float:
    """Of a sibling of so many parameters; the run of this size ends near it."""
    return 3.9 + 0.5 * (size / 3e3) ** -0.1 + 1.6 * np.exp(-step / 6) + 0.1 * step**-0.5


@pytest.fixture(scope="module")
def records(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five smaller runs on the same text, by a known law."""
    own, what = numbers_of(small(), corpus), identity_of(small(), corpus)
    what.pop("leaking")
    path = tmp_path_factory.mktemp("ladder") / "records.jsonl"
    rows = []
    for rung in range(5):
        size = own["params_active"] / 2.0 ** (5 - rung)
        curve = [[s, s * 192, fall(s, size)] for s in range(2, STEPS + 1, 2)]
        row = {"kind": "rung", "family": "f", "rung": rung, "seed": 0, **what, **own}
        row |= {"params_active": size, "params_total": size, "loss": curve[-1][2], "curve": curve}
        row |= {"flops": 6 * size * own["tokens"], "recipe_fingerprint": "r"}
        rows.append({**row, "finished": "2026-01-01T00:00:00+00:00"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Train = Callable[..., Trainer]


@pytest.fixture
def train(corpus: Corpus, mesh: Mesh) -> Train:
    """A run to its end, or until `step`, as a kill after its last whole checkpoint."""

    def go(folder: Path, *, until: int | None = None, config: Config | None = None) -> Trainer:
        trainer = Trainer(config or small(), mesh, corpus, folder, Silent(), 1e12)
        state = trainer.prepare()
        if until is not None:
            draw = trainer.next_batch

            def stop() -> Any:
                if trainer.plan.step_of(trainer.tokens) >= until:
                    raise KeyboardInterrupt
                return draw()

            trainer.next_batch = stop
            with pytest.raises(KeyboardInterrupt):
                trainer.run(state)
            trainer.checkpoints.close()
        else:
            trainer.run(state)
        return trainer

    return go


def untimed(folder: Path) -> list[dict[str, Any]]:
    rows = lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def bare(folder: Path) -> list[dict[str, Any]]:
    """The register without what differs between reruns: times, and hashes that hold them."""
    return [
        {k: v for k, v in line.items() if k not in ("time", "previous")}
        for line in read(folder / "forecasts.jsonl")
    ]


@pytest.fixture(scope="module")
def ran(
    records: Path, corpus: Corpus, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Registered before the start, then trained."""
    folder = tmp_path_factory.mktemp("planned") / "run"
    register_target(read_ladder([records]), target_of(small(), corpus), folder)
    record.check_directory(folder, small(), "auto")
    trainer = Trainer(small(), mesh, corpus, folder, Silent(), 1e12)
    trainer.run(trainer.prepare())
    return folder


def test_the_run_is_held_against_the_path_from_before_its_start(ran: Path) -> None:
    planned, *own, outcome = read(ran / "forecasts.jsonl")
    assert (planned["cutoff_step"], outcome["kind"]) == (0, "outcome")
    assert [line["cutoff_step"] for line in own] == [12, 16, 20]
    assert verify(ran / "forecasts.jsonl") == []
    steps = [point["step"] for point in planned["path"]]
    assert steps == list(range(4, STEPS + 1, 2))  # evals after the warm-up
    nll = {row["step"]: row["nll"] for row in lines(ran / "evals.jsonl")}
    for row in lines(ran / "metrics.jsonl"):
        last = (row["step"] - 1) // 2 * 2  # the line of a step is written before its eval
        assert row["forecast/registered_final"] == planned["loss"]["median"]
        if last >= 4:
            point = planned["path"][steps.index(last)]
            sigma = (point["q95"] - point["q05"]) / 3.29
            assert row["forecast/expected"] == point["median"]
            expected = (nll[last] - point["median"]) / sigma
            assert row["forecast/residual"] == pytest.approx(expected, rel=1e-9)
        # A forecast is taken over at the next eval, and no sooner.
        newest = max(
            (x for x in [planned, *own] if x["cutoff_step"] < last),
            default=planned,
            key=lambda x: x["cutoff_step"],
        )
        assert row["forecast/final"] == newest["loss"]["median"]


def test_every_forecast_is_scored_the_first_too(ran: Path, capsys: Any) -> None:
    assert forecast(["score", str(ran), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [round(one["seen"], 3) for one in scores] == [0.0, 0.5, 0.667, 0.833]


def test_each_checkpoint_holds_the_newest_hash(ran: Path, tmp_path: Path) -> None:
    for step, least in ((18, 2), (24, 5)):
        meta = json.loads((ran / f"checkpoints/{step}/meta/metadata").read_text())
        assert meta["register"]["count"] >= least, step


def test_a_slow_worker_changes_nothing(
    ran: Path,
    records: Path,
    corpus: Corpus,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, threads = forecasting.forecast_final, []

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)  # several steps
        threads.append(threading.current_thread().name)
        return made(*args, **options)

    monkeypatch.setattr(forecasting, "forecast_final", slow)
    register_target(read_ladder([records]), target_of(small(), corpus), tmp_path / "run")
    train(tmp_path / "run")
    assert len(threads) == 3 and all(name.startswith("forecast") for name in threads)
    assert bare(tmp_path / "run") == bare(ran)
    assert untimed(tmp_path / "run") == untimed(ran)


@pytest.mark.parametrize("until", [13, 19])
def test_a_kill_in_the_middle_of_a_forecast_loses_none_and_repeats_none(
    ran: Path,
    records: Path,
    corpus: Corpus,
    train: Train,
    tmp_path: Path,
    until: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoints at 12 and 18 are saved while the forecasts of 12 and 16 are not there."""
    register_target(read_ladder([records]), target_of(small(), corpus), tmp_path / "run")
    hook = forecasting.ForecastHook

    def killed(self: Any, run: Any, step: int, count: int) -> Any:
        if step + 4 > until - 3:
            return {"cutoff_step": step, "path": [], "loss": {"median": 0, "q05": 0, "q95": 0}}
        return whole(self, run, step, count)

    whole = hook._forecast
    monkeypatch.setattr(hook, "_forecast", killed)
    train(tmp_path / "run", until=until)
    assert len(read(tmp_path / "run" / "forecasts.jsonl")) == {13: 1, 19: 2}[until]
    monkeypatch.setattr(hook, "_forecast", whole)
    train(tmp_path / "run")
    assert bare(tmp_path / "run")[:4] == bare(ran)[:4]
    assert untimed(tmp_path / "run") == untimed(ran)
    assert verify(tmp_path / "run" / "forecasts.jsonl") == []


def test_forecasts_that_a_rollback_goes_past_again_are_not_repeated(
    ran: Path, records: Path, corpus: Corpus, train: Train, tmp_path: Path
) -> None:
    register_target(read_ladder([records]), target_of(small(), corpus), tmp_path / "run")
    train(tmp_path / "run", until=19)
    shutil.rmtree(tmp_path / "run/checkpoints/18")  # from 12; the forecast of 16 is there
    train(tmp_path / "run")
    assert bare(tmp_path / "run") == bare(ran)
    assert untimed(tmp_path / "run") == untimed(ran)


def test_another_register_is_refused_on_resume_and_by_verify(
    ran: Path, train: Train, tmp_path: Path, capsys: Any
) -> None:
    """A register that is whole in itself, anchor included, but not the one of the checkpoints."""
    folder = tmp_path / "run"
    train(folder, until=19)
    path, anchor = folder / "forecasts.jsonl", folder / "forecasts.head.json"
    before = path.read_bytes(), anchor.read_bytes()
    other = json.loads(before[0].split(b"\n")[0])
    other = {k: v for k, v in other.items() if k not in ("index", "previous")}
    path.unlink()
    anchor.unlink()
    for _ in range(2):
        append(path, {**other, "loss": {**other["loss"], "q05": 0.1}})
    assert forecast(["verify", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "checkpoint 18: line 1 of forecasts.jsonl was" in shown or "line 2" in shown
    with pytest.raises(UserError, match="is not the register of this run's checkpoint"):
        train(folder)
    path.unlink()
    anchor.unlink()
    with pytest.raises(UserError, match=r"it had \d lines, and forecasts.jsonl has 0"):
        train(folder)
    path.write_bytes(before[0])
    anchor.write_bytes(before[1])
    train(folder)
    assert forecast(["verify", str(folder)]) == 0


def test_a_directory_with_another_runs_forecast_is_refused(
    records: Path, corpus: Corpus, train: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    register_target(read_ladder([records]), target_of(small(), corpus), folder)
    record.check_directory(folder, replace(small(), name="b"), "auto")
    longer = replace(small(), seed=7)
    with pytest.raises(UserError, match="forecast of a run with another config"):
        record.check_directory(folder, longer, "auto")
    (folder / "notes.txt").write_text("")
    with pytest.raises(UserError, match="not a run"):
        record.check_directory(folder, small(), "auto")


def test_a_forecast_of_other_text_is_refused_at_the_start(
    records: Path, corpus: Corpus, train: Train, tmp_path: Path
) -> None:
    target = target_of(small(), corpus)
    for key in ("set_fingerprint", "train_fingerprint"):
        rows = [{**json.loads(line), key: "other"} for line in records.read_text().splitlines()]
        (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        other = replace(target, identity={**target.identity, key: "other"})
        register_target(read_ladder([tmp_path / "l.jsonl"]), other, tmp_path / key)
        with pytest.raises(UserError, match=f"forecasts {key} other and this run has"):
            train(tmp_path / key)


def test_siblings_sharpen_the_alarm_and_a_resume_goes_on_as_before() -> None:
    """A shift of 1 % in a curve that follows its siblings; alone the run cannot tell it so soon."""
    config = replace(
        small(),
        train=replace(small().train, steps=400),
        eval=replace(small().eval, every=10),
    )

    def loss(step: int, size: float, seed: int) -> float:
        noise = 0.0004 * np.random.default_rng([seed, step]).standard_normal()
        return (2 + size + 3 * (step + 5) ** -0.5) * np.exp(noise + 0.02 * np.sin(step / 25))

    steps = range(10, 401, 10)
    curves = [[[s / 400, loss(s, 0.1 * k, k)] for s in steps] for k in range(4)]

    def found(watching: Watching, steps: range) -> list[tuple[str, int]]:
        told = []
        for step in steps:
            value = loss(step, -0.1, 9) * (1.01 if step >= 200 else 1.0)
            told += [(alarm.kind, alarm.step) for alarm in watching.after_eval(step, value)]
        return told

    beside = found(Watching(config, curves), steps)
    assert ("shift", 200) in beside or ("shift", 210) in beside
    assert not [step for _, step in beside if step < 200]
    alone = [one for one in found(Watching(config), steps) if one[1] <= 220]
    assert alone == []
    seen = [(s, loss(s, -0.1, 9)) for s in range(10, 190, 10)]
    second = Watching(config, curves)
    second.restore([[], []], seen)
    assert found(second, range(190, 401, 10)) == beside


def test_the_loop_takes_the_siblings_of_the_registered_line(
    ran: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: Path,
    corpus: Corpus,
    train: Train,
    tmp_path: Path,
) -> None:
    given: list[int] = []
    kept = module.prior_of

    def told(curves: Any) -> Any:
        given.append(len(curves))
        return kept(curves)

    monkeypatch.setattr(module, "prior_of", told)
    register_target(read_ladder([records]), target_of(small(), corpus), tmp_path / "run")
    train(tmp_path / "run", until=1)
    assert given == [5]


def test_register_by_command(records: Path, text_cache: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    own = ["--target", f"{SMALL}:small", "--set", f"data.cache={text_cache}"]
    command = ["register", "--ladder", str(records), *own, "--run-dir", str(run)]
    assert forecast([*command, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == read(run / "forecasts.jsonl")[0]
    assert forecast(command) == 2
    assert "--correct REASON" in capsys.readouterr().err
    assert forecast([*command, "--correct", "a better ladder"]) == 0
    shown = capsys.readouterr().out
    assert "registered as line 2" in shown and "stack over compute" in shown
    head = json.loads((run / "forecasts.head.json").read_text())["head"]
    assert head in shown
    assert forecast(["verify", str(run)]) == 0
