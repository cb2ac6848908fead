"""Two runs beside each other: from which step and in which layer they differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import lines
from rehearsal import rehearse

from jaxmoe.config import FaultConfig, GuardConfig, HealthConfig
from jaxmoe.report.__main__ import main
from jaxmoe.report.diff import compare

EACH = HealthConfig(statistics_every=1)
AXES = {"data": 2}


@pytest.fixture(scope="module")
def sound(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    rehearse(folder, text_cache, health=EACH, axes=AXES)
    return folder


def test_a_run_and_its_repetition_are_the_same(
    sound: Path, text_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearse(tmp_path / "again", text_cache, health=EACH, axes=AXES)
    assert main(["diff", str(sound), str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "train/nll: the same bits at 24 steps" in said
    assert "layers: the same bits at 24 steps" in said


def test_the_first_step_and_layer_that_differ_are_named(
    sound: Path, text_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit of one weight, before update 10: the parameters differ after it, in one layer
    of one array more than in all others; the loss of update 10 is the first that differs."""
    flip = FaultConfig(kind="flip-parameter", step=10, array="router", bit=27, index=3)
    bent = tmp_path / "bent"
    rehearse(bent, text_cache, flip, health=EACH, axes=AXES)
    found = compare(sound, bent)
    assert not found.same and found.layers_same_until == 9 and found.layers_step == 10
    worst = max(found.layers, key=lambda one: one.relative)
    assert "router" in worst.name and worst.layer == 0
    losses = {one.name: one for one in found.numbers}
    assert losses["train/nll"].step == 10 and losses["train/nll"].same_until == 9
    assert losses["held-out holdout"].step == 10
    assert any(row.startswith("faults: ") for row in found.config)
    assert main(["diff", str(sound), str(bent)]) == 1
    assert "layers: the same up to step 9, differ at step 10" in capsys.readouterr().out
    assert main(["diff", str(sound), str(bent), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["layers_step"] == 10 and not told["same"]


def test_checksums_are_those_of_every_mesh(sound: Path, text_cache: Path, tmp_path: Path) -> None:
    """Of the same bits: drawn parameters are. Sizes agree to rounding later on."""
    first = {row["step"]: row["arrays"] for row in lines(sound / "layers.jsonl")}
    other = tmp_path / "other"
    rehearse(other, text_cache, health=EACH, axes={"expert": 4, "replica": 2})
    second = {row["step"]: row["arrays"] for row in lines(other / "layers.jsonl")}
    assert first.keys() == second.keys() == {*range(1, 25)}
    for name, one in first[24].items():
        np.testing.assert_allclose(one["rms"], second[24][name]["rms"], rtol=1e-4)
    wanted = {name for name in first[1] if "layers" in name}
    assert wanted and all(len(first[1][name]["sum"]) == 2 for name in wanted)


def test_layers_are_recorded_after_a_bad_step(text_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nan = FaultConfig(kind="nan-gradient", step=8)
    rehearse(run, text_cache, nan, guard=GuardConfig(bad_step="skip"))
    # Read when the step after was on its way: from there on ten steps beyond it.
    assert [row["step"] for row in lines(run / "layers.jsonl")][:9] == [*range(9, 18)]


def test_what_is_not_a_number_in_both_is_the_same(sound: Path, tmp_path: Path) -> None:
    odd = []
    for name in ("first", "second"):
        odd.append(tmp_path / name)
        shutil.copytree(sound, odd[-1], ignore=shutil.ignore_patterns("checkpoints"))
        with open(odd[-1] / "metrics.jsonl", "a") as out:
            out.write('{"step": 25, "train/nll": NaN, "train/grad_norm": NaN}\n')
    assert compare(*odd).same
    (odd[0] / "layers.jsonl").write_text("{}\n")
    assert main(["diff", *map(str, odd)]) == 2


def test_mistakes_are_said_in_one_line(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(sound), str(tmp_path)]) == 2
    assert "not a run's config" in capsys.readouterr().err
    empty = tmp_path / "empty"
    shutil.copytree(sound, empty, ignore=shutil.ignore_patterns("metrics.jsonl", "checkpoints"))
    assert main(["diff", str(sound), str(empty)]) == 2
    assert "no logged step in common" in capsys.readouterr().err
