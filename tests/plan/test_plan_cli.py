"""`python -m jaxmoe.plan`: the page, JSON, the search, and what it says of mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.plan import __main__ as command
from jaxmoe.plan.hardware import NAMES, TABLE, find

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["--config", f"{CONFIGS / 'quickstart.py'}:tiny", "--hardware", "h100"]
# Traced several times faster than experts with their switch over kernels.
DENSE = ["--set", "model.n_experts=1", "--set", "model.top_k=1"]


def answered(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = command.main([*TINY, *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    code, out, _ = answered(capsys, *args, "--json")
    assert code == 0
    return json.loads(out)


def test_the_page_has_its_sections(capsys: pytest.CaptureFixture[str]) -> None:
    code, page, _ = answered(
        capsys, "--devices", "8", "--set", "mesh.expert=4", "--set", "mesh.model=2", "--mfu", "0.4"
    )
    assert code == 0
    for words in (
        "model ",
        "memory of a device",
        "traffic",
        "time of a step",
        "time and money",
        "expert=4 x model=2",
        "fits: ",
        "rows to experts and back",
        "sums over heads and width",
        "at the MFU given",
    ):
        assert words in page, words
    assert all(len(line) <= command.WIDE for line in page.splitlines())


def test_json_has_everything_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--devices", "4", "--set", "mesh.expert=4", "--tokens", "1e6")
    m, run = found["memory"], found["run"]
    parts = ("parameters", "moments", "gradients", "kept", "working", "batch")
    assert m["peak"] == sum(m[part] for part in parts) and found["fits"]
    assert run["tokens"] == 10**6 and found["mesh"]["expert"] == 4
    assert run["dollars"] == pytest.approx(run["chip_hours"] * TABLE["h100"].price)
    assert {flow["kind"] for flow in found["traffic"]} >= {"rows to experts and back"}
    assert found["run_at_given_mfu"] is None


def test_efficiency_is_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    half = as_json(capsys, *DENSE, "--efficiency", "0.3")["step"]["compute"]
    whole = as_json(capsys, *DENSE, "--efficiency", "0.6")["step"]["compute"]
    assert half == pytest.approx(2 * whole)


def test_what_does_not_fit_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = command.find("h100").__class__(**{**vars(TABLE["h100"]), "hbm": 1e5})
    monkeypatch.setitem(TABLE, "h100", small)
    code, page, _ = answered(capsys, *DENSE)
    assert code == 1 and "does not fit: " in page
    code, page, _ = answered(capsys, *DENSE, "--search", "--devices", "2")
    assert code == 1 and "no mesh fits" in page


def test_the_search_ranks_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *DENSE, "--devices", "4", "--search")
    seconds = [answer["run"]["seconds_a_step"] for answer in found["best"]]
    assert len(seconds) == 10 and seconds == sorted(seconds)
    meshes = {tuple(answer["mesh"].items()) for answer in found["best"]}
    assert len(meshes) > 2 and all(answer["fits"] for answer in found["best"])
    assert found["tried"] >= 10
    code, page, _ = answered(capsys, *DENSE, "--devices", "2", "--search")
    assert code == 0 and "meshes that fit, fastest first" in page and "layouts divide" in page


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--hardware", "h1000"], "--hardware h1000: there are a100"),
        (["--devices", "0"], "--devices 0: give at least one"),
        (["--devices", "8", "--set", "mesh.model=3"], "mesh.model=3 does not divide"),
        (["--devices", "8", "--set", "mesh.data=3"], "needs 3 devices, but there are 8"),
        (["--devices", "16"], "embed dim of 24 does not divide over the mesh axes data=16"),
        (
            ["--devices", "16", "--set", "mesh.replica=16"],
            "train.batch_size=8 does not divide over the mesh axes replica=16",
        ),
        (
            ["--devices", "2", "--set", "mesh.stage=2"],
            "layers dim of 3 does not divide over the mesh axes stage=2",
        ),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answered(capsys, *args)
    assert code == 2 and out == "" and says in err
    assert err.count("\n") == 1 and err.startswith("jaxmoe.plan: ")


@pytest.mark.parametrize("args", [["--mfu", "2"], ["--tokens", "many"], ["--efficiency", "0"]])
def test_options_out_of_range(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(args)
    assert args[0] in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    page = capsys.readouterr().out
    assert "examples:" in page and all(name in page for name in NAMES)


def test_this_machine_is_measured() -> None:
    chip = find("cpu")
    assert 1e9 < chip.bf16 < 1e14 and 1e8 < chip.hbm_bandwidth < 1e13 and chip.hbm > 1e8
