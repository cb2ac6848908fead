"""Families, records, fits and the command line of ladders, without training anything."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxmoe import config as config_lib
from jaxmoe.config import BatchStage
from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import Schedule
from jaxmoe.forecast.ladder import Target
from jaxmoe.forecast.ladder_register import register_target
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.register import append
from jaxmoe.forecast.stack import Stack
from jaxmoe.ladder import records
from jaxmoe.ladder.__main__ import main
from jaxmoe.ladder.collapse import collapse
from jaxmoe.ladder.family import annealed_at, load_family, numbers, recipe, recipe_fingerprint
from jaxmoe.ladder.fit import analyse
from jaxmoe.ladder.optimal import optimal_sizes
from jaxmoe.ladder.points import branch_off, is_done, plan_points
from jaxmoe.ladder.reading import check_recipe, open_ladder
from jaxmoe.model.cost import cost
from jaxmoe.optim import rates
from jaxmoe.run import seal
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.run.target import sizes_of
from jaxmoe.transfer import tuned_at

TOY = str(Path(__file__).parent / "toy.py")


def truth(n: Any, d: Any, experts: Any = 1.0) -> Any:
    """Hoffmann's law with equal exponents, so that the best N is known; experts scale a term."""
    return 1.7 + (330 * n**-0.32 + 700 * d**-0.32) * experts**-0.03


def row_of(rung: int, ratio: float = 20.0, seed: int = 0, experts: int = 1) -> dict[str, Any]:
    """A record by that law, with its curve."""
    n = 3e6 * 2.0**rung
    d = ratio * n
    loss = truth(n, d, experts) * (1 + 0.0005 * np.random.default_rng(rung + 97 * seed).normal())
    shares = np.linspace(0.1, 1, 10)
    curve = [[int(100 * f), f * d, loss * f ** (-0.06 + 0.002 * rung)] for f in shares]
    kept = {"optim.clip": 1.0}
    return {
        "kind": "rung",
        "family": f"f{experts}",
        "rung": rung,
        "seed": seed,
        "horizon_tokens": d,
        "params_active": n,
        "params_total": n * (1 + 0.4 * (experts - 1)),
        "tokens": d,
        "flops": 6 * n * d,
        "experts": experts,
        "top_k": 1,
        "router": "softmax" if experts > 1 else "",
        "loss": float(loss),
        "set": "h",
        "set_fingerprint": "a",
        "train_fingerprint": "b",
        "tokenizer_fingerprint": "c",
        "recipe": kept,
        "recipe_fingerprint": recipe_fingerprint(kept),
        "curve": [*curve[:-1], [100, d, float(loss)]],
        "finished": "2026-11-22T12:00:00+00:00",
    }


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        records.append(folder, row)
    return folder


def test_the_recipe_is_equal_on_all_rungs_and_names_what_is_not():
    family, other = load_family(TOY), load_family(f"{TOY}:growing")
    prints = {
        recipe_fingerprint(recipe(family.config(k, seed))) for k in range(4) for seed in (0, 1)
    }
    assert len(prints) == 1
    a, b = (recipe(other.config(k)) for k in (0, 1))
    assert [k for k in a if a[k] != b[k]] == ["optim.clip"]
    assert recipe(other.config(0), ("optim.clip",)) == recipe(other.config(1), ("optim.clip",))
    changed = recipe(family.changed(["model.qk_norm=none"]).config(0))
    assert changed["model.qk_norm"] == "none" and len(changed) == len(a)


def test_families_say_what_is_wrong_with_them(tmp_path: Path):
    bad = tmp_path / "bad.py"
    bad.write_text("def rung(k):\n    return 1 / k\n\ndef number(k):\n    return k\n")
    with pytest.raises(UserError, match="no such file"):
        load_family(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="no function 'other'"):
        load_family(f"{bad}:other")
    with pytest.raises(UserError, match="rung 0: ZeroDivisionError"):
        load_family(str(bad)).config(0)
    with pytest.raises(UserError, match="it gave int, not Config"):
        load_family(f"{bad}:number").config(0)
    with pytest.raises(UserError, match=r"loss_chunk=7 .*"):
        load_family(TOY, ["model.loss_chunk=7"]).config(0)


def test_rungs_and_seeds_are_read_as_written():
    assert numbers("0..3", "--rungs") == [0, 1, 2, 3]
    assert numbers("5,0..1,0", "--rungs") == [0, 1, 5]
    assert numbers("2", "--seeds", count=True) == [0, 1]
    assert numbers("2..2", "--seeds", count=True) == [2]
    for wrong in ("", "3..1", "a", "-1", "0"):
        with pytest.raises(UserError, match="--seeds"):
            numbers(wrong, "--seeds", count=True)


def test_branches_go_like_their_trunk_until_they_decay():
    """The shorter run's rates are the trunk's up to the branch, and not one step further."""
    family = load_family(TOY)
    trunk, *branches = plan_points(family, [3], [1], [0.5, 0.75])
    assert [p.config.train.steps for p in branches] == [40, 60]
    assert trunk.config.checkpoint.at == tuple(p.branch for p in branches) == (30, 45)
    whole = rates(trunk.config)
    for point in branches:
        own = rates(point.config)
        np.testing.assert_array_equal(own[: point.branch + 1], whole[: point.branch + 1])
        assert own[point.branch + 1] < whole[point.branch + 1]
    assert trunk.config.seed == family.config(3).seed + 1
    spent = sum(p.flops for p in (trunk, *branches))
    assert spent == pytest.approx(records.flops(trunk.config, 1) * (80 + 10 + 15))
    with pytest.raises(UserError, match="cosine"):
        annealed_at(load_family(TOY, ["optim.schedule=cosine"]).config(3), [0.5])
    with pytest.raises(UserError, match="warm-up"):
        annealed_at(family.config(3), [0.02])
    ramp = (BatchStage(tokens=8000, batch_size=16),)  # the shorter run would end before it
    config = family.config(3)
    config = replace(config, train=replace(config.train, batch_ramp=ramp))
    assert annealed_at(config, [0.5]) == [40, 80]
    config = replace(config, optim=replace(config.optim, batch_rule="linear"))
    with pytest.raises(UserError, match="batch_rule"):
        annealed_at(config, [0.5])


def test_flops_are_those_that_cost_counts():
    config = load_family(TOY).config(1)
    each = cost(config.model, config.train.seq_len).flops_per_sequence
    assert records.flops(config, 40) == 40 * 8 * each
    assert records.flops(config, 7) == 7 * 8 * each


def test_a_torn_line_goes_and_later_lines_stand(tmp_path: Path):
    folder = written(tmp_path, [row_of(0), row_of(1)])
    with open(folder / "records.jsonl", "a") as file:
        file.write('{"kind": "ru')
    assert len(records.read_records(folder)) == 2
    records.append(folder, {**row_of(0), "loss": 9.0})
    assert len((folder / "records.jsonl").read_text().splitlines()) == 3
    assert [row["loss"] for row in records.read_records(folder)] == [row_of(1)["loss"], 9.0]


def test_a_ladder_of_two_recipes_is_refused_with_the_leaf_named(tmp_path: Path):
    kept = {"optim.clip": 2.0}
    other = {**row_of(1), "recipe": kept, "recipe_fingerprint": recipe_fingerprint(kept)}
    with pytest.raises(UserError, match=r"optim\.clip: 1\.0 and 2\.0"):
        open_ladder(written(tmp_path / "a", [row_of(0), other]))
    for name in ("set_fingerprint", "train_fingerprint", "tokenizer_fingerprint"):
        rows = [row_of(0), {**row_of(1), name: "zz"}]
        with pytest.raises(UserError, match=rf"{name} is 'zz'"):
            open_ladder(written(tmp_path / name, rows))


def test_a_target_of_another_recipe_is_refused_with_the_leaf_named(tmp_path: Path):
    family = load_family(TOY)
    leaves = recipe(family.config(0))
    kept = {"recipe": leaves, "recipe_fingerprint": recipe_fingerprint(leaves)}
    ladder = open_ladder(written(tmp_path, [{**row_of(k), **kept} for k in range(2)]))
    target = family.config(3)
    check_recipe(ladder, target)
    clipped = replace(target, optim=replace(target.optim, clip=2.0))
    with pytest.raises(UserError, match=r"optim\.clip: 1\.0 and 2\.0"):
        check_recipe(ladder, clipped)
    shape = replace(target.model, transfer=tuned_at(target.model))
    with pytest.raises(UserError, match=r"model\.transfer: None and "):
        check_recipe(ladder, replace(target, model=shape))


def test_a_dense_target_has_no_router():
    model = replace(load_family(TOY).config(0).model, n_experts=1, top_k=1)
    dense = replace(load_family(TOY).config(0), model=model)
    assert sizes_of(dense)["router"] == ""
    assert sizes_of(load_family(TOY).config(0))["router"] == "softmax"


def test_what_is_there_of_another_recipe_is_not_taken_for_done(tmp_path: Path):
    family = load_family(TOY)
    (point,) = plan_points(family, [0], [0])
    (other,) = plan_points(load_family(TOY, ["optim.clip=3.0"]), [0], [0])
    leaves = recipe(point.config)
    row = {
        "family": family.name,
        "rung": 0,
        "seed": 0,
        "horizon_tokens": 8 * 24 * 20,
        "recipe": leaves,
        "recipe_fingerprint": recipe_fingerprint(leaves),
        "params_active": cost(point.config.model, 24).params_active,
    }
    assert is_done(point, tmp_path, family, [row])
    assert not is_done(point, tmp_path, family, [{**row, "seed": 1}])
    with pytest.raises(UserError, match=r"optim\.clip: 1\.0 -> 3\.0"):
        is_done(other, tmp_path, family, [row])
    with pytest.raises(UserError, match="active parameters"):
        is_done(point, tmp_path, family, [{**row, "params_active": 1}])
    run = tmp_path / "runs" / point.name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": config_lib.as_dict(other.config)}))
    with pytest.raises(UserError, match=r"optim\.clip: 3\.0 -> 1\.0"):
        is_done(point, tmp_path, family, [])


def test_a_branch_without_its_trunks_state_is_a_run_of_its_own(tmp_path: Path):
    _, branch = plan_points(load_family(TOY), [1], [0], [0.5])
    assert not branch_off(branch, tmp_path)
    assert not (tmp_path / "runs" / branch.name).exists()


def test_a_branch_begins_a_register_of_its_own(tmp_path: Path):
    """The trunk's forecasts are of another end; its own checkpoint stays as it was sealed."""
    trunk, branch = plan_points(load_family(TOY), [1], [0], [0.5])
    kept = tmp_path / "runs" / trunk.name / "checkpoints" / str(branch.branch)
    for item in ITEMS:
        (kept / item).mkdir(parents=True)
    meta = {"forecast": [[4, 5.0]], "register": {"count": 1, "head": "ab"}}
    (kept / "meta" / "metadata").write_text(json.dumps(meta))
    (kept / "state" / "values").write_text("0")
    seal.write(kept, ITEMS)
    assert branch_off(branch, tmp_path)
    copy = tmp_path / "runs" / branch.name / "checkpoints" / str(branch.branch)
    assert json.loads((copy / "meta" / "metadata").read_text()) == {**meta, "register": None}
    assert json.loads((kept / "meta" / "metadata").read_text()) == meta
    assert seal.problem(copy, ITEMS) is None and seal.problem(kept, ITEMS) is None


def test_the_best_size_of_a_known_law_is_found():
    """Runs off one line of D over N, two seeds: N* = (330 / 700)^(1 / 0.64) (C / 6)^0.5."""
    rows = [row_of(k, ratio, s) for k in range(7) for ratio in (7, 20, 60) for s in (0, 1)]
    n, d, loss = (np.array([r[k] for r in rows]) for k in ("params_active", "tokens", "loss"))
    points = Points.of(n, d, loss)
    budget = 1e21
    best = optimal_sizes(points, Stack().fit(points), budget)
    known = (330 / 700) ** (1 / 0.64) * (budget / 6) ** 0.5
    assert not best.from_prior
    low, middle, high = best.params_active
    assert low < known < high and abs(np.log(middle / known)) < 0.5
    assert best.loss[0] < truth(known, budget / 6 / known) < best.loss[2]
    np.testing.assert_allclose(middle * best.tokens[1], budget / 6, rtol=0.05)


def test_one_line_of_sizes_says_that_the_split_is_the_priors(tmp_path: Path):
    found = analyse(open_ladder(written(tmp_path, [row_of(k) for k in range(7)])), 1e21)
    assert found.optimum is not None and found.optimum.from_prior
    wide = found.optimum.params_active
    assert wide[2] / wide[0] > 5
    assert [h.seen for h in found.holdouts] == [6, 5, 4]
    assert all(abs(h.error) < 0.02 for h in found.holdouts)
    assert not found.misfits and not any(one.flagged for one in found.collapse)


def test_a_rung_whose_curve_has_another_shape_is_flagged():
    rows = [row_of(k) for k in range(7)]
    assert not any(one.flagged for one in collapse(rows))
    bent = [[s, t, y * (1 + 0.08 * (1 - t / rows[3]["tokens"]))] for s, t, y in rows[3]["curve"]]
    found = collapse([*rows[:3], {**rows[3], "curve": bent}, *rows[4:]])
    assert [i for i, one in enumerate(found) if one.flagged] == [3]
    assert found[3].deviation > 0
    assert all(one.sigmas is None for one in collapse(rows[:4]))


def test_ladders_over_experts_get_the_joint_law(tmp_path: Path):
    """One ladder a number of experts, read together."""
    places = [
        written(tmp_path / str(e), [row_of(k, experts=e) for k in range(5)]) for e in (1, 4, 16)
    ]
    found = analyse(open_ladder(*places), 5e18)
    assert found.joint and found.optimum is None
    assert [m.experts for m in found.mixed] == [16.0, 4.0, 1.0]
    at = found.mixed[0]
    wanted = truth(at.params_active, at.tokens, 16.0)
    assert at.loss[1] == pytest.approx(wanted, rel=0.01)
    assert at.loss[0] < wanted < at.loss[2] < 1.04 * at.loss[0]


def test_fit_writes_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = written(tmp_path / "l", [row_of(k) for k in range(6)])
    picture = tmp_path / "p.svg"
    assert main(["fit", str(folder), "--budget", "1e20", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "forecast from the smaller ones" in out and "best run of 1e+20 FLOPs" in out
    root = ElementTree.parse(picture).getroot()
    assert len(root.findall(".//{*}circle")) == 6 and root.findall(".//{*}polygon")
    assert main(["fit", str(folder / "records.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rung"] for row in found["rows"]] == list(range(6))
    assert main(["fit", str(tmp_path)]) == 2
    assert "no records.jsonl" in capsys.readouterr().err


@pytest.fixture
def forecasted(tmp_path: Path) -> tuple[Path, Path]:
    """A ladder, and a run directory with the forecast of a target from it."""
    folder = written(tmp_path / "l", [row_of(k) for k in range(6)])
    identity = {"set": "h", "set_fingerprint": "a", "train_fingerprint": "b"}
    target = Target(
        name="big",
        config="cb",
        run="rb",
        numbers={"params_active": 1e9, "tokens": 2e10, "flops": 1.2e20},
        identity={**identity, "tokenizer_fingerprint": "c", "leaking": 0},
        schedule=Schedule(lr=np.ones(100), tokens=2e8 * np.arange(1, 101.0)),
        eval_steps=(50, 100),
    )
    register_target(open_ladder(folder), target, tmp_path / "big")
    return folder, tmp_path / "big"


def test_fit_shows_what_was_forecast_and_what_came(
    forecasted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    folder, run = forecasted
    picture = run / "p.svg"
    words = ["fit", str(folder), "--run", str(run)]
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["targets"]
    assert found["realised"] is None and found["error"] is None and found["from_here"]
    line = json.loads((run / "forecasts.jsonl").read_text())
    kept = ("config", "set", "set_fingerprint", "train_fingerprint", "leaking")
    realised = 1.01 * line["loss"]["median"]
    ended = {"kind": "outcome", "target_step": 100, "target_tokens": 2e10}
    ended |= {"loss": {"realised": realised}, **{k: line[k] for k in kept}}
    append(run / "forecasts.jsonl", ended)
    assert main([*words, "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert f"{realised:.4f}" in said and "-0.99%" in said
    assert "other records" not in said and "problems" not in said
    marks = ElementTree.parse(picture).getroot().findall(".//{*}path")
    assert len(marks) == 2 and f"came out at {realised:.4f}" in picture.read_text()


def test_fit_says_when_a_forecast_is_of_other_records_or_edited(
    forecasted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, run = forecasted
    other = written(tmp_path / "other", [row_of(k) for k in range(5)])
    assert main(["fit", str(other), "--run", str(run)]) == 0
    assert "big: its forecast rests on other records than these" in capsys.readouterr().out
    file = run / "forecasts.jsonl"
    file.write_text(file.read_text().replace('"law":"stack', '"law":"stark'))
    assert main(["fit", str(folder), "--run", str(run)]) == 0
    assert "forecast verify finds 1 problems" in capsys.readouterr().out
    file.unlink()
    assert main(["fit", str(folder), "--run", str(run)]) == 2
    assert "no forecast from before its start" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_a_run_from_elsewhere_becomes_a_record(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_lib.from_json(
        json.dumps(json.loads((straight / "config.json").read_text())["config"])
    )
    leaves = recipe(config, ("optim.clip",))
    kept = {"recipe": leaves, "recipe_fingerprint": recipe_fingerprint(leaves)}
    folder = written(tmp_path / "l", [{**row_of(0), **kept, "family": "f"}])
    words = ["add", str(straight), "--ladder", str(folder), "--rung", "7"]
    assert main([*words, "--out", str(tmp_path / "known")]) == 0
    assert "rung 7, seed 0" in capsys.readouterr().out
    (row,) = records.read_records(tmp_path / "known")
    assert (row["family"], row["rung"], row["run"]) == ("f", 7, straight.name)
    assert (row["recipe"], row["recipe_fingerprint"]) == tuple(kept.values())
    last = json.loads((straight / "evals.jsonl").read_text().splitlines()[-1])
    assert (row["loss"], row["tokens"]) == (last["nll"], last["tokens"])
    assert main([*words, "--out", str(tmp_path / "known")]) == 2
    assert "rung 7, seed 0 is recorded there already" in capsys.readouterr().err
    other = {**leaves, "model.z_loss_coef": 0.5}
    kept = {"recipe": other, "recipe_fingerprint": recipe_fingerprint(other)}
    strange = written(tmp_path / "s", [{**row_of(0), **kept}])
    assert main(["add", str(straight), "--ladder", str(strange), "--rung", "7"]) == 2
    assert "model.z_loss_coef: 0.5 and 0.0001" in capsys.readouterr().err


def test_the_gates_command_answers_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Candidates that are better, worse and no different, by the law of the baseline."""
    base = written(tmp_path / "b", [row_of(k, seed=s) for k in range(6) for s in (0, 1)])
    words = ["gate", "--baseline", str(base), "--at", "1e21"]
    for name, factor, code in (("keep", 1.4, 0), ("drop", 0.7, 1), ("undecided", 1.01, 3)):
        rows = []
        for k in range(6):
            for s in (0, 1):
                row = row_of(k, seed=s)
                n = row["params_active"]
                gain = truth(n * factor**0.5, 20 * n * factor**0.5) / truth(n, 20 * n)
                noise = 1 + 0.0004 * np.random.default_rng(k + 7 * s).normal()
                rows.append({**row, "loss": row["loss"] * gain * noise})
                rows[-1]["curve"] = []
        other = written(tmp_path / name, rows)
        assert main([*words, "--candidate", str(other), "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["verdict"] == name and bool(found["options"]) == (code == 3)
        assert main([*words, "--candidate", str(other)]) == code
        assert f"{name}: a ratio above 1 at 1e+21 FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--family", TOY, "--out", "{}"], "--rungs: say which"),
        (["run", "--family", "none.py", "--rungs", "0", "--out", "{}"], "no such file"),
        (["run", "--family", TOY, "--rungs", "0", "--out", "{}", "--horizons", "2"], "--horizons"),
        (["run", "--family", TOY, "--rungs", "0", "--out", "{}", "--submit", "x"], "{command}"),
        (
            [
                "run",
                "--family",
                TOY,
                "--rungs",
                "0",
                "--out",
                "{}",
                "--submit",
                "none {command}",
            ],
            "--submit none: No such file",
        ),
        (["gate", "--baseline", TOY, "--at", "1e20"], "--candidate G, or --change"),
        (["gate", "--baseline", TOY, "--change", "seed=1", "--at", "1e20"], "--out"),
        (["fit", "{}/none"], "no records.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([word.replace("{}", str(tmp_path)) for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("jaxmoe.ladder: ")


def test_every_command_has_examples(capsys: pytest.CaptureFixture[str]):
    for command in ("run", "fit", "register", "gate"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0 and "examples:" in capsys.readouterr().out


def test_a_runs_config_json_is_a_config(tmp_path: Path):
    config = replace(load_family(TOY).config(2), name="two")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"fingerprint": "x", "config": config_lib.as_dict(config)}))
    assert config_lib.load(str(file)) == config
    file.write_text('{"config": {"modle": {}}}')
    with pytest.raises(UserError, match=r"config\.json: unknown config key 'modle'"):
        config_lib.load(str(file))
    file.write_text("{")
    with pytest.raises(UserError, match="not a run's config"):
        config_lib.load(str(file))
