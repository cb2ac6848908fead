"""Reading damaged and growing records; scores; words; thinning; the command."""

import json
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go
import pytest

from jaxmoe.errors import UserError
from jaxmoe.report import experts, health, loss, spent, words
from jaxmoe.report.__main__ import main
from jaxmoe.report.page import write
from jaxmoe.report.plot import envelope, stacked
from jaxmoe.report.records import read
from jaxmoe.report.scores import score

MakeRun = Callable[..., Path]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize("file", ["metrics", "evals", "events", "forecasts"])
@pytest.mark.parametrize("torn", ['{"step": 71', "\0\0\0\0", '{"what": "\u00e9'])
def test_torn_last_line_is_ignored(make_run: MakeRun, file: str, torn: str) -> None:
    run = make_run(upto=700)
    whole = read(run)
    path = run / f"{file}.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode()[:-1])
    assert read(run) == whole


@pytest.mark.parametrize("file", ["metrics", "evals", "events", "forecasts"])
def test_damaged_earlier_line_names_file_and_line(make_run: MakeRun, file: str) -> None:
    run = make_run(upto=700)
    path = run / f"{file}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=rf"{file}\.jsonl, line 2: not readable"):
        read(run)


def test_value_of_the_wrong_kind_names_file_line_and_key(make_run: MakeRun) -> None:
    run = make_run(upto=700)
    forecast = json.loads((run / "forecasts.jsonl").read_text().splitlines()[0])
    del forecast["loss"]["q25"]
    append(run / "forecasts.jsonl", json.dumps(forecast) + "\n")
    with pytest.raises(UserError, match=r"forecasts\.jsonl, line 4: q25=None"):
        read(run)
    append(run / "metrics.jsonl", "[1, 2]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 71: holds list"):
        read(run)


def test_steps_run_again_after_a_resume_replace_the_abandoned_ones(make_run: MakeRun) -> None:
    run = make_run(upto=700)
    append(run / "metrics.jsonl", '{"step": 610, "train/nll": 9.0}\n')
    append(run / "evals.jsonl", '{"step": 650, "set": "holdout", "nll": 8.0}\n')
    record = read(run)
    assert [row["step"] for row in record.metrics][-3:] == [590, 600, 610]
    assert record.metrics[-1]["train/nll"] == 9.0
    assert [row["step"] for row in record.heldout][-2:] == [600, 650]
    assert record.heldout[-1]["nll"] == 8.0


def test_first_held_out_set_is_the_forecasts(make_run: MakeRun) -> None:
    run = make_run(upto=700)
    append(run / "evals.jsonl", '{"step": 700, "set": "code", "nll": 1.0}\n')
    record = read(run)
    assert list(record.evals) == ["holdout", "code"]
    assert len(loss.losses(record, score(record)).traces) == 7


def test_scores(make_run: MakeRun) -> None:
    run = make_run()
    outcome = read(run).outcome
    assert outcome is not None
    forecast = json.loads((run / "forecasts.jsonl").read_text().splitlines()[0])
    for shift, inside in ((0, (True, True)), (0.1, (False, True)), (-1.0, (False, False))):
        median = outcome + shift
        spread = {"q05": -0.2, "q25": -0.05, "q75": 0.05, "q95": 0.2}
        forecast["loss"] = {"median": median, **{k: median + v for k, v in spread.items()}}
        rows = [forecast, {"kind": "outcome", "step": 2000, "loss": {"realised": outcome}}]
        (run / "forecasts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        one = score(read(run))[0]
        assert (one.inside_50, one.inside_90) == inside
        assert one.error == pytest.approx(shift / outcome)
        assert one.share == pytest.approx(0.1)


def test_running_run_is_not_scored(make_run: MakeRun) -> None:
    scores = score(read(make_run(upto=700)))
    assert len(scores) == 3
    assert all(one.error is one.inside_50 is one.inside_90 is None for one in scores)


@pytest.mark.parametrize("upto", [10, 700, 2000])
def test_figures_are_valid_plotly(make_run: MakeRun, upto: int) -> None:
    run = read(make_run(upto=upto))
    scores = score(run)
    figures = [loss.losses(run, scores), loss.narrowing(run, scores)]
    for figure in [*figures, health.optimiser(run), experts.load(run), health.speed(run)]:
        go.Figure(data=figure.traces, layout=figure.layout)  # refuses an unknown property
        assert figure.caption.endswith(".")


def test_captions_carry_the_numbers(make_run: MakeRun) -> None:
    run = read(make_run())
    scores = score(run)
    half = sum(one.inside_50 is True for one in scores)
    most = sum(one.inside_90 is True for one in scores)
    said = loss.narrowing(run, scores).caption
    assert f"inside {half} of 9 intervals of 50 % and {most} of 9 of 90 %" in said
    assert "at step 730" in health.optimiser(run).caption  # where the synthetic run spikes
    assert "No token was dropped" in experts.load(run).caption
    assert "by step 150" in loss.losses(run, scores).caption


def test_passing_xz_is_the_first_result_below_it(make_run: MakeRun) -> None:
    run = read(make_run())
    level = loss.xz_nats(run)
    last = run.heldout[-1]
    assert level == pytest.approx(1.871 * last["nll"] / last["bits_per_byte"])
    below = [row["step"] for row in run.heldout if row["nll"] < level]
    assert min(below) == 150


def test_envelope_keeps_spikes_order_and_end() -> None:
    line = [(float(x), 0.0, None) for x in range(100_000)]
    line[54_321] = (54_321.0, 9.0, None)
    line[54_400] = (54_400.0, -9.0, None)
    thin = envelope(line, 1000)
    assert len(thin) <= 1001
    assert line[54_321] in thin and line[54_400] in thin and thin[-1] == line[-1]
    assert thin == sorted(thin)


def test_load_of_a_long_run_is_thinned_and_keeps_its_last_step(make_run: MakeRun) -> None:
    run = make_run()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wide = [{"step": row["step"], "moe/load": [[1.0] * 64] * 48} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wide))
    figure = experts.load(read(run))
    columns = figure.traces[0]["x"]
    assert 20 <= len(columns) <= 100 and columns[-1] == 2000
    assert len(figure.extra["layers"]) == 48


def test_panels_fill_the_height() -> None:
    top, middle, bottom = stacked(3)
    assert top[1] == 1 and bottom[0] == pytest.approx(0) and middle[1] < top[0]


def test_words() -> None:
    assert [words.big(n) for n in (999, 999_999, 3_412_096)] == ["999", "1.00 M", "3.41 M"]
    assert words.big(1.8e12) == "1.80 T"
    assert words.big(2e20, "FLOP") == "200 EFLOP"
    assert words.big(None) == words.fixed(None) == words.percent(None) == words.DASH
    assert words.side(0.0123) == "1.23 % too high" and words.side(-0.5) == "50.00 % too low"
    assert words.when(0) == "1970-01-01 00:00:00" and words.when("then") == "then"
    leaves = words.flat({"a": {"b": [1, 2], "c": {}}, "d": None, "e": True, "f": 32_000_000})
    assert dict(leaves) == {"a.b": "1, 2", "a.c": "{}", "d": "none", "e": "true", "f": "32,000,000"}


def test_write_replaces_the_page_and_leaves_nothing_else(make_run: MakeRun) -> None:
    run = make_run(upto=100)
    before = set(run.iterdir())
    (run / "report.html").write_text("old")
    assert write(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert set(run.iterdir()) == before | {run / "report.html"}


def test_command(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(), tmp_path / "page.html"
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(run), "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(out) and out.is_file()
    assert answer["step"] == 2000 and len(answer["forecasts"]) == 9
    assert answer["heldout_nll"] == pytest.approx(answer["outcome"])


def test_command_explains_a_mistake_in_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(upto=100)
    (run / "metrics.jsonl").write_text('{"step": 1, "tr')
    (run / "evals.jsonl").unlink()
    mistakes = ([str(tmp_path / "none")], [str(tmp_path)], [str(run)])
    for argv in (*mistakes, [str(make_run(upto=100)), "--out", str(tmp_path / "no" / "x.html")]):
        assert main(argv) == 2
        answer = capsys.readouterr()
        assert answer.out == "" and answer.err.count("\n") == 1 and "Traceback" not in answer.err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_band_is_a_ring_from_lower_to_upper_and_back(make_run: MakeRun) -> None:
    run = read(make_run(upto=700))
    band = loss.losses(run, score(run)).traces[0]
    half = len(band["x"]) // 2
    assert band["x"][:half] == band["x"][half:][::-1]
    pairs = list(zip(band["y"][:half], band["y"][half:][::-1], strict=True))
    assert pairs[-1][0] < pairs[-1][1] and all(low <= high for low, high in pairs)


def test_names_in_figures_are_not_markup(make_run: MakeRun) -> None:
    run = make_run(upto=100)
    append(run / "evals.jsonl", '{"step": 100, "set": "<a href=x>b</a>", "nll": 1.0}\n')
    names = [trace["name"] for trace in loss.losses(read(run), []).traces]
    assert "held-out: &lt;a href=x&gt;b&lt;/a&gt;" in names


def test_damaged_ledger_is_named(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(upto=100)
    append(run / "goodput.jsonl", '{"time": "yesterday", "start": 1}\n')
    assert main([str(run)]) == 2
    assert "goodput.jsonl: not a ledger" in capsys.readouterr().err


def test_run_from_before_there_was_a_ledger(make_run: MakeRun) -> None:
    run = make_run(upto=700)
    (run / "goodput.jsonl").unlink()
    figure = spent.goodput([("old", read(run))])
    assert figure.traces == []
    assert figure.caption == "No ledger of the time (goodput.jsonl). 1 start, 49.4 s of training."
