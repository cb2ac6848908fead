"""Several runs on one page, in a real browser and in its parts."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browsing import drawn, requests
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.score import score, summarise
from jaxmoe.report import calibration, compare, heat, overlay, spent
from jaxmoe.report.__main__ import main
from jaxmoe.report.progress import AXES
from jaxmoe.report.records import read
from jaxmoe.report.style import LIMIT, style

Opener = Callable[..., Chrome]
MakeRun = Callable[..., Path]
RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "records"
FIGURES = {"loss", "errors", "calibration", "load", "speed", "goodput"}


@pytest.fixture(scope="module")
def several(make_run: MakeRun) -> list[Path]:
    """Ended, of a higher rate; ended; half way, without experts."""
    return [
        make_run(name="base"),
        make_run(name="hot", lr=6e-3),
        make_run(name="dense", upto=700, moe="none"),
    ]


@pytest.fixture(scope="module")
def compared(several: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare.write(several, tmp_path_factory.mktemp("compared") / "page.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_page_of_several_is_quiet_whole_and_asks_for_nothing(
    show: Opener, compared: Path, width: int
) -> None:
    chrome = show(compared, width)
    assert chrome.get_log("browser") == []
    outside = [url for url in requests(chrome) if not url.startswith(("data:", "blob:"))]
    assert outside == [compared.as_uri()]
    figures = drawn(chrome)
    assert figures.keys() == FIGURES
    for name, (traces, wide, high, marks) in figures.items():
        assert wide > 0.8 * min(width, 950) and high > 200, name
        assert marks >= traces - (name == "calibration"), name  # its band has no edge
    assert chrome.execute_script("return document.scrollingElement.scrollWidth") <= width + 1


def test_each_run_has_its_line_in_the_table_and_the_figure(show: Opener, compared: Path) -> None:
    chrome = show(compared)
    rows = chrome.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == ["base", "hot", "dense"]
    assert "ended, 2,000 steps" in rows[0].text and "35 % of 2,000 steps" in rows[2].text
    told = chrome.execute_script("""
        return document.getElementById("plot-loss").data.filter(function (trace) {
          return trace.mode === "lines+markers";
        }).map(function (trace) { return [trace.name, trace.line.dash, trace.marker.symbol]; });""")
    looks = [style(i) for i in range(3)]
    assert told == [
        [name, own.dash, own.symbol]
        for name, own in zip(("base", "hot", "dense"), looks, strict=True)
    ]


def test_hostile_names_of_several_stay_text(
    show: Opener, make_run: MakeRun, tmp_path: Path
) -> None:
    # plotly draws tags that it does not know as they are, and <b> as bold.
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>x</b>"
    run = make_run(name=attack)
    text = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(text.replace("training loss", attack))
    chrome = show(compare.write([run, make_run(name="other")], tmp_path / "page.html"))
    for id in FIGURES - {"calibration"}:
        assert attack in chrome.find_element(By.ID, f"plot-{id}").text, id
    assert attack in chrome.title
    assert chrome.find_elements(By.TAG_NAME, "img") == []
    assert chrome.get_log("browser") == []


def test_no_two_styles_need_their_colour() -> None:
    looks = [style(i) for i in range(LIMIT)]
    assert len({(one.dash, one.symbol) for one in looks}) == LIMIT == 30
    assert len({one.dash for one in looks[:5]}) == len({one.symbol for one in looks[:5]}) == 5


def test_another_axis_moves_every_trace(show: Opener, compared: Path) -> None:
    chrome = show(compared)
    read_x = """const div = document.getElementById("plot-loss");
        return [div.layout.xaxis.title.text, div.data.map(function (t) { return t.x; })];"""
    title, before = chrome.execute_script(read_x)
    assert title == "tokens" and before[-1] == [2000 * 2048]
    chrome.find_element(By.CSS_SELECTOR, "#across option[value='share']").click()
    WebDriverWait(chrome, 10).until(lambda _: chrome.execute_script(read_x)[0] == AXES["share"])
    _, after = chrome.execute_script(read_x)
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert after[-1] == [100]


def test_axes_of_a_run_agree_at_its_ends(several: list[Path]) -> None:
    for one in compare.shown([read(run) for run in several]):
        last = one.run.metrics[-1]
        step, end = last["step"], 2000
        assert one.progress.at("tokens", [0, step, end]) == [0, step * 2048, end * 2048]
        assert one.progress.at("compute", [step]) == [pytest.approx(last["flops"], rel=1e-5)]
        assert one.progress.at("hours", [step]) == [pytest.approx(last["seconds"] / 3600, rel=1e-5)]
        assert one.progress.at("share", [end / 2]) == [50]


def test_choice_changes_the_maps_and_their_scale(show: Opener, compared: Path) -> None:
    chrome = show(compared)
    read_map = """const div = document.getElementById("plot-load");
        return [div.data.map(function (t) { return [t.z.length, t.z[0][0]]; }),
                div.layout.coloraxis.cmin, div.layout.yaxis.title.text];"""
    maps, low, what = chrome.execute_script(read_map)
    assert [count for count, _ in maps] == [4, 4] and what == "layer"
    names = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, "#layer option")]
    assert names[-4:] == [f"Experts of layer {i}" for i in range(4)] and len(names) == 7
    chrome.find_element(By.CSS_SELECTOR, "#layer option[value='4']").click()
    WebDriverWait(chrome, 10).until(lambda _: chrome.execute_script(read_map)[2] == "expert")
    experts, lower, _ = chrome.execute_script(read_map)
    assert [count for count, _ in experts] == [8, 8] and lower < low


def test_maps_hold_what_was_logged(several: list[Path]) -> None:
    figure = heat.loads(compare.shown([read(run) for run in several]))
    assert "Nothing is logged of dense." in figure.caption
    last = read(several[1]).metrics[-1]
    by_name = {one["name"]: one["marks"]["heat-1"] for one in figure.extra["layers"]}
    whole = by_name["Most loaded expert of each layer"]
    assert [row[-1] for row in whole["z"]] == [round(max(x), 3) for x in last["moe/load"]]
    of_2 = by_name["Experts of layer 2"]
    assert [row[-1] for row in of_2["z"]] == [round(x, 3) for x in last["moe/load"][2]]


def test_config_differences_are_named_and_nothing_else(make_run: MakeRun) -> None:
    one, other = (read(make_run(name="x", lr=lr)) for lr in (3e-3, 6e-3))
    assert compare.differences([one.config, other.config]) == [["optim.lr", "0.003", "0.006"]]
    assert compare.differences([one.config, one.config]) == []
    inner = {"a": {"b": 1, "c": 2}, "d": 3}
    assert compare.differences([inner, {**inner, "a": None}]) == [["a", "set", "none"]]
    rows = compare.differences([inner, {**inner, "a": None}, {**inner, "a": {"b": 5, "c": 2}}])
    assert rows == [["a.b", "1", compare.ABSENT, "5"], ["a", "set", "none", "set"]]


def test_labels_are_told_apart(make_run: MakeRun) -> None:
    paths = [make_run(name="twin", upto=100) for _ in range(2)]
    labels = [one.label for one in compare.shown([read(path) for path in paths])]
    assert labels == [f"twin ({path.resolve()})" for path in paths]
    moved = paths[0].rename(paths[0].with_name("elsewhere"))
    labels = [one.label for one in compare.shown([read(moved), read(paths[1])])]
    assert labels == ["twin (elsewhere)", "twin (run)"]
    with pytest.raises(UserError, match="named 2 times"):
        compare.shown([read(moved), read(moved)])


def test_scores_are_those_of_the_forecast_command() -> None:
    runs = [read(RECORDS / name) for name in ("target_dense", "target_moe")]
    found = calibration.past([(run.name, run) for run in runs])
    plain = [one for run in runs for one in score(register.read(run.path / "forecasts.jsonl"))]
    names = [name for name, _ in found.scores]
    assert [one for _, one in found.scores] == plain and found.without == []
    assert found.rows[:-1] == summarise(plain, runs=names)
    assert found.table[-1][0] == "all" and found.table[-1][1] == str(len(plain))
    assert (
        "target_moe: 10 forecasts, the first 2.82 % too high" in calibration.errors(found).caption
    )


def test_runs_without_an_outcome_are_named(make_run: MakeRun) -> None:
    young = read(make_run(name="young", upto=700))
    found = calibration.past([("young", young)])
    assert found.scores == [] and found.without[0].startswith("young: no outcome in the register")
    assert calibration.errors(found).traces == calibration.calibrated(found).traces == []


def test_records_without_metrics_are_shown(show: Opener, tmp_path: Path) -> None:
    runs = [RECORDS / "target_dense", RECORDS / "target_moe"]
    chrome = show(compare.write(runs, tmp_path / "page.html"), 390)
    assert chrome.get_log("browser") == []
    assert drawn(chrome).keys() == {"loss", "errors", "calibration"}
    assert "No ledger of the time" in chrome.find_element(By.ID, "goodput").text
    assert "target_moe came out at 1.1159" in chrome.find_element(By.ID, "loss").text
    assert main([str(runs[1]), "--out", str(tmp_path / "one.html")]) == 0
    chrome = show(tmp_path / "one.html")
    assert chrome.get_log("browser") == []
    assert drawn(chrome).keys() == {"loss", "narrowing"}


def test_bars_of_time_are_whole_and_survive_a_grey_printer(several: list[Path]) -> None:
    runs = [(run.name, run) for run in map(read, several)]
    figure = spent.goodput(runs)
    totals = [sum(bar["x"][i] for bar in figure.traces) for i in range(3)]
    assert totals == pytest.approx([100] * 3, abs=1e-3)
    looks = [(pattern, grey(fill)) for fill, pattern in spent.LOOKS.values()]
    for (pattern, shade), (other, after) in combinations(looks, 2):
        assert pattern != other or abs(shade - after) > 45
    first = runs[0][1].spent
    assert first is not None and (first.undone, first.starts) == (60, 2)
    assert first.spent["undone"] == 3_600_000 and first.spent["down"] == 90_000_000
    table = {row[0]: row[1] for row in figure.table}
    assert table["starts"] == "2" and table["steps undone"].startswith("3.6 s")


def grey(colour: str) -> float:
    """What a printer makes of #rrggbb, of 255."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_alarms_lie_on_their_own_curve(several: list[Path]) -> None:
    figure = overlay.losses(compare.shown([read(run) for run in several]))
    alarms = [trace for trace in figure.traces if trace["name"] == "alarms"]
    assert len(alarms) == 2 and all("99.5 % band" in trace["text"][0] for trace in alarms)
    assert alarms[0]["x"] == [730 * 2048]
    assert 2.9 < alarms[0]["y"][0] < 3.6  # of the held-out curve, not of the batch's spike


def test_ladder_is_shown_with_its_target(
    show: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(RECORDS / name) for name in ("target_moe", "target_dense")]
    out = tmp_path / "page.html"
    assert main([*runs, "--ladder", str(RECORDS / "ladder_moe"), "--out", str(out)]) == 0
    chrome = show(out)
    assert chrome.get_log("browser") == []
    section = chrome.find_element(By.ID, "ladder")
    rows = [row.text for row in section.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert "1.1159" in rows[0] and "these records" in rows[0] and "other records" in rows[1]
    traces = chrome.execute_script("""
        return document.getElementById("plot-ladder").data.map(function (t) {
          return [t.name, Array.from(t.x), Array.from(t.y)]; });""")
    known = {name: (x, y) for name, x, y in traces}
    lines = (RECORDS / "ladder_moe" / "records.jsonl").read_text().splitlines()
    assert len(known["rungs"][0]) == len(lines)
    assert known["target_moe, outcome"][1] == [pytest.approx(1.11586, abs=1e-4)]
    # Targets of about one compute lie beside each other, not on each other.
    assert known["target_dense"][0][0] > 1.05 * known["target_moe"][0][0]
    assert main([runs[0], "--ladder", str(tmp_path), "--out", str(out)]) == 2
    assert "no records.jsonl" in capsys.readouterr().err


def test_command_compares_several(
    several: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, several), "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["report"] == "comparison.html" and (tmp_path / "comparison.html").is_file()
    assert [run["name"] for run in said["runs"]] == ["base", "hot", "dense"]
    time = said["runs"][0]["time"]
    assert sum(time["buckets"].values()) == pytest.approx(time["seconds"])
    assert time["goodput"] == pytest.approx(time["buckets"]["steps"] / time["seconds"])
    assert main([str(several[0]), str(tmp_path / "none")]) == 2
    assert "no such run directory" in capsys.readouterr().err
