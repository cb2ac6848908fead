"""A run directory that no trainer made, and a headless browser to look at its page."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)

STEPS, EVERY = 2000, 10
LAYERS, EXPERTS = 4, 8
CUTOFFS = range(200, STEPS, 200)
TOKENS = 8 * 256  # of a step
SPIKE = 730
DEAD = (1, 5, (380, 390, 400))  # layer, expert, steps


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_run(name=..., upto=..., moe=...) writes a run directory at step `upto` of 2000."""

    def make(**options: Any) -> Path:
        return write_run(tmp_path_factory.mktemp("runs") / "run", **options)

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as chrome:
        yield chrome


@pytest.fixture
def show(browser: webdriver.Chrome) -> Callable[..., webdriver.Chrome]:
    """Opens a page from disk at a width and waits until its figures are drawn."""

    def show(page: Path, width: int = 1280) -> webdriver.Chrome:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # reading empties it: what follows is of this page alone
        browser.get(page.as_uri())
        drawn = "return document.documentElement.dataset.drawn"
        WebDriverWait(browser, 30).until(lambda chrome: chrome.execute_script(drawn) == "yes")
        return browser

    return show


def loss_at(step: float) -> float:
    decay = max(0.0, (step - 0.8 * STEPS) / (0.2 * STEPS))
    return 2.9 + 5.4 * (1 + step / 12) ** -0.62 - 0.09 * decay


def write_run(
    run: Path,
    *,
    name: str = "ladder-3 base",
    upto: int = STEPS,
    moe: str = "all",
    lr: float = 3e-3,
) -> Path:
    """A run directory at step `upto`: finished when that is the last step. `moe`: see `experts`."""
    run.mkdir(parents=True)
    done = upto == STEPS
    own = config(name)
    own["optim"]["lr"] = lr
    record = {"fingerprint": "8f14e45fceea", "config": own}
    (run / "config.json").write_text(json.dumps(record))
    (run / "environment.json").write_text(json.dumps(environment()))
    write_lines(run / "metrics.jsonl", metrics(upto, moe))
    write_lines(run / "evals.jsonl", evals(upto))
    write_lines(run / "events.jsonl", events(upto))
    write_lines(run / "goodput.jsonl", ledger(upto))
    write_lines(run / "forecasts.jsonl", [*forecasts(upto), *([outcome()] if done else [])])
    return run


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "seed": 0,
        "model": {"vocab_size": 4096, "d_model": 128, "n_layers": LAYERS, "n_experts": EXPERTS},
        "data": {"path": None, "tokenizer": "bpe", "max_bytes": 32_000_000, "holdout": []},
        "optim": {"name": "adamw", "lr": 3e-3, "clip": 1.0, "warmup_steps": 50},
        "train": {"steps": STEPS, "batch_size": 8, "seq_len": 256, "log_every": EVERY},
        "mesh": {"replica": 1, "stage": 1, "data": -1, "expert": 2, "model": 1},
    }


def environment() -> dict[str, Any]:
    return {
        "jax": "0.10.2",
        "python": "3.11.7",
        "devices": "8 x cpu",
        "peak_flops": 1.9e11,
        "params": 3_412_096,
        "params_active": 1_839_232,
        "flops_per_token": 1.23e7,
        "compile_seconds": 12.4,
        "first_step_seconds": 13.1,
        "data": {"xz_bits_per_byte": 1.871, "documents": 5121, "fingerprint": "a" * 64},
        "mesh": {"replica": 1, "data": 4, "expert": 2},
    }


def metrics(upto: int, moe: str) -> Iterable[dict[str, Any]]:
    rng = random.Random(0)
    for step in range(EVERY, upto + 1, EVERY):
        load = [loads(rng, step, layer) for layer in range(LAYERS)]
        nll = loss_at(step) + rng.gauss(0, 0.06) + (1.2 if step == SPIKE else 0)
        rate = 3e-3 * min(1.0, step / 50, max(0.0, (STEPS - step) / (0.2 * STEPS)))
        pace = 0.052 * rng.lognormvariate(0, 0.04)
        yield {
            "step": step,
            "tokens": step * TOKENS,
            "flops": step * TOKENS * 1.23e7,
            "seconds": 13 + 0.052 * step,
            "train/nll": nll,
            "train/loss": nll + 0.02,
            "train/grad_norm": 0.4 * rng.lognormvariate(0, 0.3) + 6 / step + 5 * (step == SPIKE),
            "train/lr": rate,
            **experts(load, step, moe),
            "perf/tokens_per_second": TOKENS / pace,
            "perf/mfu": TOKENS / pace * 1.23e7 / 1.9e11 / 8,
            "perf/step_seconds": pace,
        }


def experts(load: list[list[float]], step: int, moe: str) -> dict[str, Any]:
    """What is logged of the experts. "all"; "summary": without the load of each, as of many;
    "old": without what is said of each layer; "none": a dense model's."""
    if moe == "none":
        return {}
    lows, highs = [min(layer) for layer in load], [max(layer) for layer in load]
    dead = [sum(value < 0.01 for value in layer) for layer in load]
    layers = {
        "load_min": lows,
        "load_max": highs,
        "load_entropy": [entropy(layer) for layer in load],
        "dead": dead,
        "drop_rate": [0.0] * LAYERS,
        "load_balance": [1.0 + 0.02 * layer for layer in range(LAYERS)],
        "router_z": [0.38 + 0.02 * layer for layer in range(LAYERS)],
        "bias_low": [-1e-4 * step * (1 + layer) for layer in range(LAYERS)],
        "bias_high": [2e-4 * step for _ in range(LAYERS)],
    }
    whole = {"moe/load_max": max(highs), "moe/load_min": min(lows), "moe/load_balance": 1.03}
    whole |= {"moe/router_z": 0.41, "moe/drop_rate": 0.0}
    of_each = {"moe/load": load} if moe != "summary" else {}
    if moe == "old":
        return {**whole, **of_each}
    of_layers = {f"moe/layer/{key}": values for key, values in layers.items()}
    return {**whole, **of_each, **of_layers, "moe/dead_experts": sum(dead)}


def entropy(load: list[float]) -> float:
    shares = [value / EXPERTS for value in load]
    return -sum(p * math.log(p) for p in shares if p) / math.log(EXPERTS)


def loads(rng: random.Random, step: int, layer: int) -> list[float]:
    """Uneven at first, settling; deeper layers stay a little less even. One dies for a while."""
    spread = 0.08 + 0.03 * layer + 0.5 * math.exp(-step / 250)
    tilts = [spread * math.sin(2.3 * expert + layer) for expert in range(EXPERTS)]
    raw = [math.exp(tilt + rng.gauss(0, 0.04)) for tilt in tilts]
    if layer == DEAD[0] and step in DEAD[2]:
        raw[DEAD[1]] = 0.0
    return [EXPERTS * value / sum(raw) for value in raw]


def evals(upto: int) -> Iterable[dict[str, Any]]:
    for step in range(0, upto + 1, 50):
        nll = loss_at(step) + 0.03
        common = {"step": step, "tokens": step * TOKENS, "set_fingerprint": "c4ca4238a0b9"}
        yield {**common, "set": "holdout", "nll": nll, "bits_per_byte": nll / math.log(2) / 3.1}


def events(upto: int) -> Iterable[dict[str, Any]]:
    start = 1_790_000_000.0
    why = "8 x cpu, config 8f14e45fceea"
    yield {"time": start, "step": 0, "what": "start", "why": why}
    for step in range(200, upto + 1, 200):
        yield {"time": start + step, "step": step, "what": "checkpoint", "why": f"step {step}"}
        if step == 800:
            why = "training loss 1.2 above the 99.5 % band of the forecast at step 600"
            yield {"time": start + step, "step": SPIKE, "what": "alarm", "why": why}
            yield {"time": start + step + 90, "step": 800, "what": "resume", "why": "SIGTERM"}
    if upto == STEPS:
        yield {"time": start + upto, "step": upto, "what": "done", "why": "all steps trained"}


def ledger(upto: int) -> Iterable[dict[str, Any]]:
    """Two starts: the first ended at step 860, and 60 of its steps were for nothing."""
    yield {"time": clock(0), "start": 1}
    yield {"time": clock(13), "start": 1, "step": 0, "back": 0, "seconds": {"startup": 13.0}}
    begun, start, late = 0, 1, 13.0
    for step in [*range(200, min(upto, 800) + 1, 200), 860, 0, *range(1000, upto + 1, 200)]:
        if step > upto:
            return
        if not step:
            yield {"time": clock(late + 90), "start": 2}
            spent = {"startup": 5.0, "restore": 2.0}
            yield {"time": clock(late + 97), "start": 2, "step": 800, "back": 800, "seconds": spent}
            begun, start, late = 800, 2, late + 97
            continue
        steps = 0.06 * (step - begun)
        spent = {"steps": steps, "data": 0.5, "evaluation": 1.0, "checkpoint": 0.25}
        late += steps + 1.75
        yield {"time": clock(late), "start": start, "step": step, "seconds": spent}
        begun = step


def clock(seconds: float) -> str:
    return datetime.fromtimestamp(1_790_000_000 + round(seconds, 6), UTC).isoformat()


def forecasts(upto: int) -> Iterable[dict[str, Any]]:
    rng = random.Random(3)
    for index, cutoff in enumerate(range(200, upto, 200)):
        scale = 0.11 * (1 - cutoff / STEPS) ** 0.8
        bias = rng.gauss(0, 0.8) * scale
        yield {
            "kind": "forecast",
            "index": index,
            "previous": "0" * 64,
            "time": 1_790_000_000.0 + cutoff,
            "cutoff_step": cutoff,
            "cutoff_tokens": cutoff * TOKENS,
            "target_step": STEPS,
            "target_tokens": STEPS * TOKENS,
            "law": "power law with decay term",
            "set_fingerprint": "c4ca4238a0b9",
            "loss": around(loss_at(STEPS) + 0.03 + bias, scale),
            "path": [fan(cutoff, share, bias, scale) for share in (0, 0.15, 0.4, 0.7, 0.8, 0.9, 1)],
        }


def fan(cutoff: int, share: float, bias: float, scale: float) -> dict[str, float]:
    step = cutoff + share * (STEPS - cutoff)
    grown = math.sqrt(share)
    return {"step": round(step), **around(loss_at(step) + 0.03 + bias * grown, scale * grown)}


def around(median: float, scale: float) -> dict[str, float]:
    levels = {"q05": -1.645, "q25": -0.674, "q75": 0.674, "q95": 1.645}
    return {"median": median, **{name: median + z * scale for name, z in levels.items()}}


def outcome() -> dict[str, Any]:
    loss = {"realised": loss_at(STEPS) + 0.03}
    own = {"kind": "outcome", "target_step": STEPS, "set_fingerprint": "c4ca4238a0b9"}
    return {**own, "loss": loss}
