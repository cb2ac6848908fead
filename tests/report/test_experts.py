"""The figure of the experts, whatever a run has logged of them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from jaxmoe.config import ModelConfig
from jaxmoe.model.stack import kinds
from jaxmoe.report import experts
from jaxmoe.report.plot import Figure
from jaxmoe.report.records import read

MakeRun = Callable[..., Path]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def put(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def load(run: Path) -> Figure:
    figure = experts.load(read(run))
    go.Figure(data=figure.traces, layout=figure.layout)  # refuses an unknown property
    return figure


def panels(figure: Figure) -> list[str]:
    names = sorted(key for key in figure.layout if key.startswith("yaxis"))
    return [figure.layout[name]["title"]["text"] for name in names]


def marked(figure: Figure, name: str) -> Any:
    return next(trace for trace in figure.traces if trace.get("meta") == name)


@pytest.mark.parametrize("model", [
    {"n_layers": 3},
    {"n_layers": 5, "first_dense": 2, "n_mtp": 2},
    {"n_layers": 7, "first_dense": 1, "moe_every": 3},
    {"n_layers": 6, "moe_every": 2, "n_mtp": 1},
])  # fmt: skip
def test_layers_have_their_numbers_in_the_model(model: dict[str, Any]):
    config = ModelConfig(**model)
    mtp = [f"MTP {k + 1}" for k in range(config.n_mtp)]
    wanted = [str(i) for i, kind in enumerate(kinds(config)) if kind.moe] + mtp
    assert experts.layer_names(asdict(config), len(wanted)) == wanted
    # Lines that the config does not explain are numbered as they come.
    assert experts.layer_names(asdict(config), 9) == [str(i) for i in range(9)]


@pytest.mark.parametrize(("moe", "shown"), [
    ("all", ["expert", "load", "entropy", "dead", "bias"]),
    ("summary", ["load", "entropy", "dead", "bias"]),
    ("old", ["expert", "load"]),
])  # fmt: skip
def test_panels_are_of_what_is_logged(make_run: MakeRun, moe: str, shown: list[str]):
    figure = load(make_run(moe=moe))
    assert panels(figure) == shown
    assert figure.caption.count("lighter is more") == ("expert" in shown)
    assert set(figure.extra["layers"][2]["marks"]) == {
        trace["meta"] for trace in figure.traces if "meta" in trace
    }
    domains = [figure.layout[key]["domain"] for key in sorted(figure.layout) if "yaxis" in key]
    assert domains[0][1] == 1 and domains[-1][0] == pytest.approx(0, abs=1e-9)
    for above, below in zip(domains, domains[1:], strict=False):
        assert below[0] < below[1] < above[0]


def test_the_range_is_the_same_from_layers_and_from_every_expert(make_run: MakeRun):
    """Loads of each expert are enough for runs of before there was more."""
    new, old = load(make_run(upto=400)), load(make_run(upto=400, moe="old"))
    assert marked(new, "band") == marked(old, "band")
    assert len(marked(new, "band")["y"]) == 2 * 40


def test_lines_show_the_numbers_of_their_layer(make_run: MakeRun):
    run = make_run(upto=700)
    logged = rows(run)
    figure = load(run)
    for layer, entry in enumerate(figure.extra["layers"]):
        marks = entry["marks"]
        for key in ("load_entropy", "dead"):
            assert marks[key]["y"] == [row[f"moe/layer/{key}"][layer] for row in logged]
        lows, highs = (
            [row[f"moe/layer/bias_{k}"][layer] for row in logged] for k in ("low", "high")
        )
        assert marks["bias"]["y"] == lows + highs[::-1]
    for name, shown in figure.extra["layers"][0]["marks"].items():
        assert shown.items() <= marked(figure, name).items()  # at first
    least = [min(row["moe/layer/load_entropy"]) for row in logged]
    dotted = [t for t in figure.traces if t["yaxis"] == "y3" and "meta" not in t]
    assert dotted[0]["y"] == pytest.approx(least, rel=1e-5)


def test_dead_experts_have_a_panel_only_where_there_were_some(make_run: MakeRun):
    run = make_run(upto=700)
    assert "0 experts at the end, 1 at worst, at step 380" in load(run).caption
    young = load(make_run(upto=370))
    assert "dead" not in panels(young)
    assert "No expert was dead (under 1 % of an even share)" in young.caption


def test_a_run_that_began_before_layers_were_logged_has_gaps(make_run: MakeRun):
    run, old = make_run(upto=700), make_run(upto=700, moe="old")
    put(run, rows(old)[:30] + rows(run)[30:])
    figure = load(run)
    assert panels(figure) == ["expert", "load", "entropy", "dead", "bias"]
    entropy = marked(figure, "load_entropy")["y"]
    assert [y is None for y in entropy] == [True] * 30 + [False] * 40
    assert min(marked(figure, "bias")["x"]) == 310
    assert len(figure.table) == 5


def test_the_table_is_of_the_last_step(make_run: MakeRun):
    run = make_run(upto=700)
    last = rows(run)[-1]
    head, *body = load(run).table
    assert head == ["layer", "least loaded", "most loaded", "entropy", "dead", "dropped",
                    "balance loss", "router z", "bias from", "bias to"]  # fmt: skip
    for layer, row in enumerate(body):
        known = {key[10:]: values[layer] for key, values in last.items() if "moe/layer/" in key}
        assert row == [
            str(layer),
            f"{known['load_min']:.2f}",
            f"{known['load_max']:.2f}",
            f"{known['load_entropy']:.4f}",
            "0",
            "0.00 %",
            f"{1 + 0.02 * layer:.3f}",
            f"{0.38 + 0.02 * layer:.3f}",
            f"{-0.07 * (1 + layer):.4f}",
            "0.1400",
        ]


def test_many_layers_of_many_experts_stay_small(make_run: MakeRun):
    """61 layers and their summaries over 2000 steps are well under the size of plotly itself."""
    run = make_run(moe="summary")
    lines = [
        {k: v * 16 if k.startswith("moe/layer/") else v for k, v in row.items()}
        for row in rows(run)
        for _ in range(10)
    ]
    for step, row in enumerate(lines, 1):
        row["step"] = step
    put(run, lines)
    figure = load(run)
    assert len(figure.extra["layers"]) == 64
    assert len(json.dumps([figure.extra, figure.traces])) < 2_000_000


@pytest.mark.parametrize("junk", [None, 3, [], ["x"], [1.0], [1.0, None, 1.0, 1.0]])
def test_junk_is_not_drawn(make_run: MakeRun, junk: Any):
    """Of one key: the others stay."""
    run = make_run(upto=100, moe="summary")
    put(run, [{**row, "moe/layer/load_entropy": junk} for row in rows(run)])
    assert panels(load(run)) == ["load", "bias"]
    put(run, [{**row, "moe/layer/load_min": junk, "moe/layer/load_max": junk} for row in rows(run)])
    assert len(panels(load(run))) == (2 if junk == [1.0] else 0)
