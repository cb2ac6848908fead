"""The benchmark on small synthetic data: task definitions, no look-ahead, the report, the CLI."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ladder_cases import dense_truth, ladder, recipe

from jaxmoe.errors import UserError
from jaxmoe.forecast.__main__ import main
from jaxmoe.forecast.benchmark import Report, _cross_validate, run_benchmark
from jaxmoe.forecast.benchmark_data import GRID, Curve, load_curves, load_points
from jaxmoe.forecast.benchmark_tasks import across_compute, by_size, within_run
from jaxmoe.forecast.mixture import Mixture

POINTS: tuple[str, ...] = (
    "set",
    "run",
    "params_active",
    "params_total",
    "experts",
    "top_k",
    "router",
    "tokens",
    "unique_tokens",
    "flops",
    "loss",
)
CURVES = ("set", "family", "params_active", "run", "step", "fraction", "lr_relative", "loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ladders and two sets of curves in the files' format, with values missing."""
    folder = tmp_path_factory.mktemp("loss_curves")
    with open(folder / "points.csv", "w", newline="") as file:
        writer: csv.DictWriter = csv.DictWriter(file, POINTS)
        writer.writeheader()
        for i, name in enumerate(("aa_one", "aa_two", "bb_one")):
            points = ladder(dense_truth(np.random.default_rng(i)), budgets=11, seed=i)
            for j in range(len(points)):
                row: dict[str, Any] = {"set": name, "experts": 1, "router": "dense", "run": ""}
                for key in ("params_active", "tokens", "loss"):
                    row[key] = float(getattr(points, key)[j])
                row["flops"] = "" if j == 3 else float(points.flops[j])
                writer.writerow(row)
    with gzip.open(folder / "curves.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, CURVES)
        writer.writeheader()
        for name, seed in (("xx", 0), ("yy", 1)):
            for run in recipe([1e7, 5e7, 2e8], seed=seed, every=20):
                _write(writer, name, run, hide_rate=name == "yy")
    return folder


def _write(writer: csv.DictWriter, name: str, run, *, hide_rate: bool) -> None:
    for step, loss in zip(run.steps, run.loss, strict=True):
        rate = "" if hide_rate else run.schedule.lr[step - 1]
        row = {"set": name, "family": "cosine", "run": run.name, "params_active": run.params_active}
        share = step / run.schedule.steps
        writer.writerow({**row, "step": step, "fraction": share, "lr_relative": rate, "loss": loss})


@pytest.fixture(scope="module")
def report(data: Path) -> Report:
    return run_benchmark(data)


def test_the_report_is_deterministic_and_complete(data: Path, report: Report) -> None:
    assert run_benchmark(data) == report
    rows = {(row.item, row.case): row for row in report.rows}
    one = rows["across compute", "at most 1/10: median"]
    assert one.count == 3
    assert set(one.by_set) == {"aa_one", "aa_two", "bb_one"}
    assert float(one.measured) == pytest.approx(
        np.median(np.abs(list(one.by_set.values()))), abs=0.01
    )
    assert one.met is True
    half = rows["with siblings", "50% seen: median, mean of sets"]
    assert half.count == 4  # two larger runs of each set
    assert float(half.measured) < 0.5
    kinds = {row.case for row in report.rows if row.item == "coverage of 90 %"}
    assert {k.split(":")[0] for k in kinds} >= {"across compute", "siblings", "run alone"}


def test_a_sets_own_outcomes_do_not_tune_it() -> None:
    """Each set wants its own of two widths; whatever its outcome is, its width is the others'."""

    def choose(outcomes: list[float]) -> tuple[list[float], list[float]]:
        names = ["one", "two", "three"]

        def mixture(i: int, values: Sequence[float]) -> Mixture:
            sd = np.array([[values[0]]])
            return Mixture(weight=np.ones(1), mean=np.ones((1, 1)), sd=sd)

        tuned: dict[str, dict[str, list[float]]] = {}
        truths = [np.array([value]) for value in outcomes]
        chosen = _cross_validate(names, truths, mixture, [(0.01,), (0.1,)], "width", tuned)
        return [value[0] for value in chosen], tuned["width"]["all"]

    assert choose([1.0, 1.0, 1.0]) == ([0.01] * 3, [0.01])
    assert choose([1.0, 1.0, 1.1]) == ([0.1, 0.1, 0.01], [0.1])


def test_tasks_across_compute_see_only_small_runs(data: Path) -> None:
    tasks = list(across_compute(load_points(data), (10.0, 1000.0)))
    assert len(tasks) == 3  # at a thousandth fewer than four budgets are left
    for task in tasks:
        assert task.seen.flops.max() <= task.targets.flops[-1] / 10 * 1.001
        assert task.targets.flops.min() > 1.9 * task.seen.flops.max()
    sets = load_points(data)
    assert np.isfinite(sets["aa_one"].flops).all()  # a missing one is 6 N D


def test_the_largest_size_is_forecast_from_a_third_and_below(data: Path) -> None:
    task = by_size(load_points(data)["aa_one"])
    assert task.seen.params_active.max() <= task.targets.params_active.max() / 3
    assert len(set(task.targets.params_active.tolist())) == 1


def test_tasks_within_a_run_know_smaller_siblings_whole(data: Path) -> None:
    curves = load_curves(data)
    for task in within_run(curves, (0.2, 0.5), with_siblings=True):
        assert all(s.params_active < task.curve.params_active for s in task.siblings)
        assert all(s.set == task.curve.set and s.share[-1] == 1.0 for s in task.siblings)
        seen = task.target()
        true = task.curve.loss[task.curve.share <= task.share + 1e-9]
        assert seen.loss.tolist() == true.tolist()


def test_an_eval_is_never_placed_before_its_time() -> None:
    """0.3 and 0.30004 are one step of the grid: the cut is made before it."""
    share = np.array([0.1, 0.30004, 0.6, 1.0])
    curve = Curve(
        set="s",
        family="f",
        name="r",
        params_active=1e8,
        step=share,
        share=share,
        rate=np.full(4, np.nan),
        loss=np.array([4.0, 3.5, 3.2, 3.0]),
    )
    assert curve.run(until=0.3).loss.tolist() == [4.0]
    assert curve.run(until=0.30004).loss.tolist() == [4.0, 3.5]
    run = curve.run()
    assert run.loss[-1] == 3.0
    assert run.steps[-1] == GRID
    assert run.schedule.lr[-1] < 0.01  # no rate given: it decays


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--benchmark", "--data", str(tmp_path)]) == 2
    assert "points.csv: no such file" in capsys.readouterr().err
    assert main(["score", "--benchmark"]) == 2
    assert main(["score"]) == 2
    with pytest.raises(UserError, match=r"curves\.csv\.gz"):
        load_curves(tmp_path)


def test_the_benchmark_as_json_and_table(
    data: Path, report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxmoe.forecast.cli_benchmark.run_benchmark", lambda *_: report)
    words = ["score", "--benchmark", "--data", str(data)]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["measured"] for row in answer["rows"]] == [row.measured for row in report.rows]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "across compute" in text
    assert "tuned by cross-validation" in text


@pytest.fixture
def records(tmp_path: Path) -> Path:
    points = ladder(dense_truth(np.random.default_rng(0)))
    path = tmp_path / "ladder.csv"
    lines = ["params,tokens,loss"]
    for n, d, y in zip(points.params_active, points.tokens, points.loss, strict=True):
        lines.append(f"{n},{d},{y}")
    path.write_text("\n".join(lines))
    return path


def test_fit_records_for_a_target(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(records), "--flops", "1e21", "--json"]) == 0
    by_flops = json.loads(capsys.readouterr().out)
    assert by_flops["target"]["tokens"] / by_flops["target"]["params_active"] == pytest.approx(
        20, rel=0.3
    )
    size = {"--params": "2.9e9", "--tokens": "5.8e10"}
    words = [word for pair in size.items() for word in pair]
    assert main(["fit", str(records), *words, "--json"]) == 0
    by_size_ = json.loads(capsys.readouterr().out)
    loss = list(by_size_["loss"].values())
    assert loss == sorted(loss)
    assert by_size_["target"]["flops"] == pytest.approx(6 * 2.9e9 * 5.8e10)
    assert by_size_["loss"]["median"] == pytest.approx(by_flops["loss"]["median"], rel=0.01)
    assert main(["fit", str(records), *words]) == 0
    text = capsys.readouterr().out
    assert "weighed by backtest" in text
    assert "profiled" in text


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--params", "1e9"], "give the target"),
        (["--flops", "-1"], "must be a finite number above 0"),
        (["--flops", "nan"], "must be a finite number above 0"),
        (["--params", "1e7", "--tokens", "1e8"], "of the largest run's compute"),
    ],
)
def test_a_senseless_target_is_refused(
    records: Path, words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(records), *words]) == 2
    assert match in capsys.readouterr().err


def test_too_few_records_are_refused(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("\n".join(records.read_text().splitlines()[:4]))
    assert main(["fit", str(few), "--flops", "1e21"]) == 2
    assert "3 distinct compute budgets" in capsys.readouterr().err
