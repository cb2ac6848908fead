"""The page in a real browser: it is drawn, quiet, self-contained, and moves when asked to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import drawn, requests
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from jaxmoe.report.page import write

Opener = Callable[..., Chrome]
TRACES = {"loss": 8, "narrowing": 4, "optimiser": 3, "load": 11, "speed": 3, "goodput": 8}


@pytest.fixture(scope="module")
def finished(make_run: Callable[..., Path]) -> Path:
    return write(make_run())


def fan(chrome: Chrome) -> Any:
    return chrome.execute_script("""
        const traces = document.getElementById("plot-loss").data;
        return ["90 %", "50 %", "median"].map(function (name) {
          const trace = traces.find(function (one) { return one.meta === name; });
          return [trace.x, trace.y];
        });""")


def path_drawn(chrome: Chrome) -> str | None:
    area = "#plot-loss .scatterlayer .trace .js-fill"
    return chrome.find_element(By.CSS_SELECTOR, area).get_attribute("d")


def test_page_is_quiet_and_asks_nothing_of_the_network(show: Opener, finished: Path) -> None:
    chrome = show(finished)
    assert chrome.get_log("browser") == []
    outside = [url for url in requests(chrome) if not url.startswith(("data:", "blob:"))]
    assert outside == [finished.as_uri()]
    entries = chrome.execute_script(
        "return performance.getEntriesByType('resource').map(function (e) { return e.name; })"
    )
    assert [name for name in entries if not name.startswith(("data:", "blob:"))] == []


def test_plotly_is_inlined_once(finished: Path) -> None:
    page = finished.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert "<script src" not in page
    assert len(page) < 6_000_000


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn(show: Opener, finished: Path, width: int) -> None:
    figures = drawn(show(finished, width))
    assert {name: figure[0] for name, figure in figures.items()} == TRACES
    for name, (_, wide, high, marks) in figures.items():
        assert wide > 0.8 * min(width, 950) and high > (150 if name == "goodput" else 300), name
        assert marks >= TRACES[name], name


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(show: Opener, finished: Path, width: int) -> None:
    chrome = show(finished, width)
    assert chrome.execute_script("return innerWidth") == width
    scroll = chrome.execute_script("return document.scrollingElement.scrollWidth")
    assert scroll <= width + 1


def test_slider_and_buttons_change_the_fan(show: Opener, finished: Path) -> None:
    chrome = show(finished)
    sentence = chrome.find_element(By.ID, "fan-sentence")
    assert "Registered at step 200" in sentence.text  # a finished run opens at its first forecast
    before, path = fan(chrome), path_drawn(chrome)
    chrome.find_element(By.ID, "fan-next").click()
    WebDriverWait(chrome, 10).until(lambda _: path_drawn(chrome) != path)
    assert all(x[0] == 400 for x, _ in fan(chrome))
    assert "Registered at step 400" in sentence.text
    chrome.find_element(By.ID, "fan").send_keys(Keys.END)
    assert "Registered at step 1,800" in sentence.text
    assert chrome.find_element(By.ID, "fan-label").text.startswith("step 1,800")
    chrome.find_element(By.ID, "fan").send_keys(Keys.HOME)
    assert fan(chrome) == before
    chrome.find_element(By.ID, "fan-back").click()  # there is nothing before the first
    assert fan(chrome) == before


def test_views_change_the_axes(show: Opener, finished: Path) -> None:
    chrome = show(finished)
    figure = "document.getElementById('plot-loss').layout"
    axis = f"return [{figure}.xaxis.type, {figure}.yaxis.range]"
    _, close = chrome.execute_script(axis)
    chrome.find_element(By.CSS_SELECTOR, "[data-view='Whole run']").click()
    _, whole = chrome.execute_script(axis)
    assert whole[1] > 8 > close[1]
    button = chrome.find_element(By.CSS_SELECTOR, "[data-view='Log steps']")
    button.click()
    assert chrome.execute_script(axis)[0] == "log"
    assert button.get_attribute("aria-pressed") == "true"
    assert len(chrome.find_elements(By.CSS_SELECTOR, "[aria-pressed='true']")) == 1


def test_layer_changes_what_is_shown_of_it_alone(show: Opener, finished: Path) -> None:
    chrome = show(finished)
    read = """return document.getElementById("plot-load").data.map(function (trace) {
        return [trace.meta || trace.name, JSON.stringify(trace.z || trace.y)]; });"""
    before = chrome.execute_script(read)
    chrome.find_element(By.CSS_SELECTOR, "#layer option[value='1']").click()
    after = chrome.execute_script(read)
    changed = [name for (name, old), (_, new) in zip(before, after, strict=True) if old != new]
    assert changed == ["heat", "band", "load_entropy", "dead", "bias"]
    assert [name for name, _ in after if name not in changed] == ["all layers"] * 6


def test_run_without_the_load_of_each_expert_renders(
    show: Opener, make_run: Callable[..., Path]
) -> None:
    chrome = show(write(make_run(moe="summary")), 390)
    assert chrome.get_log("browser") == []
    assert drawn(chrome)["load"][0] == TRACES["load"] - 1
    read = """return document.getElementById("plot-load").data.map(function (trace) {
        return trace.type + JSON.stringify(trace.y); });"""
    before = chrome.execute_script(read)
    assert not any(trace.startswith("heatmap") for trace in before)
    chrome.find_element(By.CSS_SELECTOR, "#layer option[value='1']").click()
    assert chrome.execute_script(read) != before
    assert chrome.get_log("browser") == []
    table = chrome.find_elements(By.CSS_SELECTOR, "#load tbody tr")
    assert [row.text.split()[0] for row in table] == ["0", "1", "2", "3"]


def test_dense_run_renders(show: Opener, make_run: Callable[..., Path]) -> None:
    run = make_run(moe="none")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"n_experts": 8', '"n_experts": 1'))
    chrome = show(write(run))
    assert chrome.get_log("browser") == []
    assert drawn(chrome).keys() == TRACES.keys() - {"load"}
    section = chrome.find_element(By.ID, "load")
    assert section.text == "Expert load\nA dense model: it has no experts."


def test_headline_says_the_numbers(show: Opener, finished: Path) -> None:
    text = show(finished).find_element(By.TAG_NAME, "header").text.replace("\u00a0", " ")
    last = json.loads((finished.parent / "forecasts.jsonl").read_text().splitlines()[-1])
    outcome = last["loss"]["realised"]
    for part in ("ladder-3 base", "Finished at step 2,000", f"{outcome:.3f} nats/token", "1.871"):
        assert part in text
    assert "4.10 M" in text and "3.41 M" in text and "1.84 M" in text


def test_hostile_names_stay_text(show: Opener, make_run: Callable[..., Path]) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = make_run(name=attack)
    for file in ("evals.jsonl", "events.jsonl", "forecasts.jsonl", "environment.json"):
        text = (run / file).read_text()
        for word in ("holdout", "SIGTERM", "power law with decay term", "8 x cpu"):
            text = text.replace(word, attack)
        (run / file).write_text(text)
    chrome = show(write(run))  # an alert would make every later command fail
    assert chrome.find_element(By.TAG_NAME, "h1").text == attack
    assert attack in chrome.title
    assert attack in chrome.find_element(By.ID, "fan-label").text
    assert attack in chrome.find_element(By.ID, "plot-loss").text
    assert chrome.find_elements(By.TAG_NAME, "img") == []
    assert chrome.get_log("browser") == []
    assert {name: figure[0] for name, figure in drawn(chrome).items()} == TRACES


def test_policy_stops_a_script_that_is_not_the_page_s_own(show: Opener, finished: Path) -> None:
    page = finished.with_name("tampered.html")
    text = finished.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "<script>window.ran = 1</script></main>"), "utf-8")
    assert show(page).execute_script("return window.ran") is None


def test_young_run_renders(show: Opener, make_run: Callable[..., Path]) -> None:
    run = make_run(upto=100)
    for file in set(run.iterdir()) - {run / "metrics.jsonl"}:
        file.unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "train/n')
    chrome = show(write(run), 390)
    assert chrome.get_log("browser") == []
    assert drawn(chrome).keys() == {"loss", "optimiser", "load", "speed"}
    text = chrome.find_element(By.TAG_NAME, "body").text
    assert "No forecast of the final loss is registered yet" in text
    assert "At step 100" in text
    assert chrome.find_elements(By.ID, "fan") == []
    chrome.find_element(By.CSS_SELECTOR, "[data-view='Log steps']").click()


def test_running_run_shows_its_latest_forecast(show: Opener, make_run: Callable[..., Path]) -> None:
    chrome = show(write(make_run(upto=700)))
    assert fan(chrome)[0][0][0] == 600
    names = chrome.execute_script(
        "return document.getElementById('plot-loss').data.map(function (t) { return t.name; })"
    )
    assert "outcome" not in names
    assert "35 % of the run" in chrome.find_element(By.CLASS_NAME, "status").text


def test_diverged_run_renders(show: Opener, make_run: Callable[..., Path]) -> None:
    run = make_run(upto=400)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[20:]:
        row["train/nll"] = row["train/grad_norm"] = float("nan")
        row["moe/load"] = [[float("nan")] * 8] * 4
        row |= {key: [float("nan")] * 4 for key in row if key.startswith("moe/layer/")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chrome = show(write(run))
    assert chrome.get_log("browser") == []
    last = "return document.getElementById('plot-load').data[0].x.slice(-1)[0]"
    assert chrome.execute_script(last) == 200


def test_figures_do_not_lean_on_colour(show: Opener, finished: Path) -> None:
    """In figure 1 no two lines share both dash and width: they differ on a grey printer too."""
    styles = show(finished).execute_script("""
        return document.getElementById("plot-loss").data.filter(function (trace) {
          return trace.mode.includes("lines") && !trace.fill;
        }).map(function (trace) {
          return [trace.line.dash || "solid", trace.line.width, trace.mode].join();
        });""")
    assert len(set(styles)) == len(styles) == 4
