"""Configs and records that nobody could have meant: refused in one line, and nothing is written."""

import csv
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    VALUES,
    asked,
    bent,
    examples,
    forged,
    of_json,
    of_lines,
    of_values,
    raw,
    refused,
    snapshot,
)
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe import config as config_lib
from jaxmoe import train
from jaxmoe.config import Config, apply_sets, load
from jaxmoe.config_check import check
from jaxmoe.errors import LONGEST, UserError
from jaxmoe.forecast.__main__ import main as forecast
from jaxmoe.forecast.rate_law import fit_optima, fit_power_law, read_sweep
from jaxmoe.ladder.__main__ import main as ladder
from jaxmoe.optim import rates
from jaxmoe.outside import LARGEST, finite, loads, needed, plain_name, reading
from jaxmoe.run import record

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
Main = Callable[[Sequence[str]], int]

KEYS = [key for key, _ in config_lib.leaves(dataclasses.asdict(Config()))]
ODD_KEYS = ["", ".", "a..b", "model", "model.", "model.mla.x", "faults.0.kind", "train.steps.x"]
# Python literals that JSON has not, that are too large, too deep, or not what the field is of.
LITERALS = (
    *("b'x'", "{1, 2}", "{1: 2}", "{(1, 2): 3}", "{[]: 1}", "1j", "...", "()", "((),)", "[1, 2]"),
    *("1e999", "-1e999", "nan", "1e-320", "1e400", "-1", "0", "2147483648", "9223372036854775807"),
    *("9" * 5000, "(" * 5000, "[" * 300 + "]" * 300, "[" * 100_000, "1" + "0" * 25, "True", "None"),
    *("'\\ud800'", "\udcff", "\0", "a\nb", "f'{1}'", "__import__('os').system('x')", "x" * 300),
    *("{'name': 'a'}", "({'name': 'a'},)", "[{'kind': 'kill', 'step': 1}]", "../../x", "/tmp/x"),
)


@given(st.sampled_from(KEYS), st.one_of(st.sampled_from(LITERALS), st.text(max_size=20)))
@examples(400)
def test_any_value_is_set_or_refused(key: str, value: str) -> None:
    """And what is accepted gives a learning rate for every step, without a warning."""

    def use() -> None:
        config = apply_sets(Config(), [f"{key}={value}"])
        check(config)
        if key.startswith(("optim", "train")) and config.train.steps < 10**6:
            assert (rates(config) == rates(config)).all()

    refused(use, key, key.split(".")[0])


@given(st.one_of(st.sampled_from(ODD_KEYS), st.text(max_size=12)), st.sampled_from(LITERALS))
@examples(300)
def test_any_key_is_known_or_refused(key: str, value: str) -> None:
    refused(lambda: apply_sets(Config(), [f"{key}={value}"]))
    refused(lambda: apply_sets(Config(), [key]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's config.json, alone in its folder."""
    folder = tmp_path_factory.mktemp("configs")
    shutil.copy(RECORDS / "target_moe" / "config.json", folder)
    return folder / "config.json"


@given(change=st.one_of(raw(), of_json(), of_json(), of_json()))
@examples(250)
def test_any_config_json_is_a_config_or_named(recorded: Path, change: Any) -> None:
    with bent(recorded, change):
        refused(lambda: load(str(recorded)), recorded)
        refused(lambda: record.read_config(recorded.parent), recorded)


@pytest.mark.parametrize(
    "spec",
    ["a" * 300, "/tmp", "README.md", "x\0y", "pyproject.toml", ":", "configs/quickstart.py:os"],
    ids=lambda spec: spec[:20],
)
def test_what_is_no_config_file_is_refused(spec: str) -> None:
    """Also a compiled module, which would be code that nobody can read."""
    assert refused(lambda: load(spec))


def test_only_readable_code_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "mine.pyc").write_bytes(b"\x80\x04" * 50)
    assert "named *.py" in (refused(lambda: load(str(tmp_path / "mine.pyc"))) or "")
    argv = ["run", "--family", str(tmp_path / "mine.pyc"), "--rungs", "0", "--out"]
    assert asked(ladder, *argv, str(tmp_path / "ladder"))[0] == 2


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "a/b", "", "a\x1b[2J", "\ud800"])
def test_a_name_leads_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Path
) -> None:
    """The name of a config, which may come from anybody's file, becomes a folder below runs/."""
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    tree = json.loads(recorded.read_text())
    tree["config"]["name"] = name
    (work / "config.json").write_text(json.dumps(tree))
    monkeypatch.chdir(work)
    before = snapshot(tmp_path)
    ladders = str(RECORDS / "ladder_moe" / "records.jsonl")
    for main, argv in (
        (train.main, ["--config", "config.json"]),
        (forecast, ["register", "--ladder", ladders, "--target", "config.json"]),
    ):
        code, _, said = asked(main, *argv, codes=())
        assert code == 2 and ("name=" in said or "config.json" in said)
    assert snapshot(tmp_path) == before
    refused(lambda: record.run_dir(None, config_lib.replace(Config(), name=name)), "name=")


def test_names_of_folders() -> None:
    assert plain_name("quickstart-2.b") and record.run_dir(None, Config()) == Path("runs/unnamed")
    assert not any(map(plain_name, ("", ".", "..", "a/b", "a\\b", "/a", "a\0", "a\nb", "x" * 201)))


# What a mistake in each kind of record says, by the command that reads it.


@pytest.fixture(scope="module")
def ladders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of our own records, a CSV file and counts of pass rates."""
    folder = tmp_path_factory.mktemp("ladders")
    for name in ("ladder_dense", "ladder_moe", "gate_qk"):
        shutil.copytree(RECORDS / name, folder / name)
    shutil.copy(RECORDS / "transfer.jsonl", folder / "sweep.jsonl")
    lines = (folder / "ladder_dense" / "records.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["params_active", "tokens", "loss"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "runs.csv").write_text(table.getvalue())
    counts = [
        {"compute": 10.0**c, "bucket": b, "task": t, "passes": 2 * i, "tries": 50}
        for i, c in enumerate(range(17, 21))
        for b in "xy"
        for t in ("t1", "t2")
    ]
    (folder / "counts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in counts))
    return folder


def of_cells() -> st.SearchStrategy[Any]:
    """A field of a CSV file replaced."""
    odd = ("", "a", "nan", "inf", "-1", "0", "1e400", "1e308", "1e-308", '"', '"\n', "1,2", "\0")

    def change(place: int, value: str) -> Callable[[bytes], bytes]:
        def bend(data: bytes) -> bytes:
            lines = data.decode().splitlines()
            cells = lines[place % len(lines)].split(",")
            cells[place % len(cells)] = value
            lines[place % len(lines)] = ",".join(cells)
            return "\n".join(lines).encode()

        return bend

    return st.builds(change, st.integers(0, 10**4), st.sampled_from(odd))


LINES = st.one_of(raw(), of_lines(), of_lines(), of_lines())


@given(change=LINES)
@examples(60)
def test_any_records_of_a_ladder_are_fitted_or_named(ladders: Path, change: Any) -> None:
    one, other = ladders / "ladder_dense", ladders / "gate_qk"
    with bent(one / "records.jsonl", change):
        asked(ladder, "fit", str(one), "--json")
        asked(forecast, "fit", str(one / "records.jsonl"), "--flops", "1e20", "--json")
    argv = ["--baseline", str(ladders / "ladder_moe"), "--candidate", str(other), "--at", "1e15"]
    with bent(other / "records.jsonl", change):
        asked(ladder, "gate", *argv, "--json", codes=(0, 1, 3))


@given(change=st.one_of(raw(), of_cells(), of_cells()))
@examples(80)
def test_any_table_of_runs_is_fitted_or_named(ladders: Path, change: Any) -> None:
    with bent(ladders / "runs.csv", change):
        asked(forecast, "fit", str(ladders / "runs.csv"), "--flops", "1e20", "--json")


@given(change=LINES)
@examples(150)
def test_any_counts_and_sweeps_are_fitted_or_named(ladders: Path, change: Any) -> None:
    file, run = ladders / "counts.jsonl", ladders / "run"
    shutil.rmtree(run, ignore_errors=True)
    with bent(file, change):
        argv = ["--flops", "1e21", "--run-dir", str(run), "--json"]
        code, _, said = asked(forecast, "passes", str(file), *argv)
        assert code == 0 or not run.exists(), said
    sweep = ladders / "sweep.jsonl"
    with bent(sweep, change):
        refused(lambda: fit_power_law(fit_optima(read_sweep(sweep, "width"))))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A run that was forecast from a ladder, with the register of its pass rates."""
    shutil.copytree(RECORDS / "target_dense", tmp_path / "target")
    return tmp_path / "target"


@given(change=of_values())
@examples(60)
def test_a_forged_forecast_from_a_ladder_is_named(ladders: Path, target: Path, change: Any) -> None:
    """Whoever writes a register can make its chain whole."""
    head = target / "forecasts.head.json"
    kept = head.read_bytes()
    config = target / "config.json"
    with bent(target / "forecasts.jsonl", forged(change, head)):
        asked(ladder, "fit", str(ladders / "ladder_dense"), "--run", str(target), "--json")
        config.rename(target.parent / "away.json")
        for file in target.iterdir():
            if not file.name.startswith("forecasts"):
                file.unlink()
        refused(lambda: record.check_directory(target, Config(), "auto"))
        for name in ("environment.json", "evals.jsonl", "events.jsonl", "records.jsonl"):
            shutil.copy(RECORDS / "target_dense" / name, target)
        (target.parent / "away.json").rename(config)
    head.write_bytes(kept)


@given(change=of_values())
@examples(60)
def test_a_forged_register_of_pass_rates_is_named(
    ladders: Path, tmp_path: Path, change: Any
) -> None:
    """Before its outcome is registered, and when it is scored."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    counts, outcome = ladders / "counts.jsonl", tmp_path / "outcome.jsonl"
    largest = [json.loads(line) for line in counts.read_text().split("\n")[-5:-1]]
    outcome.write_text("".join(json.dumps({**r, "compute": 1e21}) + "\n" for r in largest))
    argv = ["--run-dir", str(run), "--json"]
    assert asked(forecast, "passes", str(counts), "--flops", "1e21", *argv, codes=(0,))[0] == 0
    register = run / "pass_rates.jsonl"
    text = register.read_bytes()
    head = run / "pass_rates.head.json"
    with bent(register, forged(change, head)):
        asked(forecast, "verify", str(run), "--json")
        asked(forecast, "passes", str(counts), "--flops", "1e22", *argv)
    register.write_bytes(text)
    shutil.rmtree(run)


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    """Whatever is quoted in it: files of others are."""
    said = str(UserError("a\nb \x1b[2J \ud800 " + "x" * 10_000))
    assert said.startswith("a b \\x1b[2J \\ud800 x") and said.isprintable()
    assert len(said) < LONGEST + 20


@given(value=st.sampled_from(VALUES))
@examples(60)
def test_numbers_and_needs(value: Any) -> None:
    """A number is one that floats can be reckoned with; what is needed is there and is of its
    type."""
    small = type(value) is int and abs(value) < LARGEST
    assert finite(value) == (small or (type(value) is float and math.isfinite(value)))
    fits = type(value) is int and finite(value)
    said = refused(lambda: needed({"key": value}, {"key": int}, "file"), "file: key=")
    assert (said is None) == fits
    assert refused(lambda: needed({}, {"key": (int, type(None))}, "file"), "file: key=None")


def test_whatever_fails_while_a_file_is_read_names_it() -> None:
    deep, gone = (lambda: loads("[" * 10**5)), (lambda: open("/no/x"))
    for fail in (deep, gone, lambda: {}["x"], lambda: 1 // 0):
        with pytest.raises(UserError, match=r"^file: .*; mend it$"), reading("file", "mend it"):
            fail()
    with pytest.raises(UserError, match="^its own$"), reading("file"):
        raise UserError("its own")
    with pytest.raises(MemoryError), reading("file"):  # is no matter of the file alone
        raise MemoryError
