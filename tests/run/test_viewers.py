"""TensorBoard and Weights & Biases have what the record has, value by value, also after a kill."""

import importlib.util
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import finish, kill_group, lines, logged, metrics, started, train, wait_until
from small import small
from viewed import Board, board, wandb_rows

from jaxmoe.config import replace
from jaxmoe.config_run import LogConfig
from jaxmoe.errors import UserError
from jaxmoe.run import viewers
from jaxmoe.run.record import RunRecord, check_directory
from jaxmoe.run.viewers import TensorBoard, points

BOTH = ("--set", "log.tensorboard=true", "--set", "log.wandb=tests", "--set", "log.terminal=quiet")


@dataclass(frozen=True)
class Shown:
    run_dir: Path  # killed behind step 14, then taken up from step 12 to its end
    half: Path  # as the kill left it
    stdout: str  # of the second start


@pytest.fixture(scope="module")
def shown(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("shown")
    run_dir, half, log = folder / "run", folder / "half", folder / "log"
    with started(train(run_dir, *BOTH), text_cache, log) as process:
        there = lambda: logged(run_dir) >= 14 and (run_dir / "checkpoints" / "12").exists()  # noqa: E731
        wait_until(process, there, log)
        kill_group(process)
    shutil.copytree(run_dir, half, symlinks=True)
    stdout = finish(train(run_dir, *BOTH), text_cache)
    return Shown(run_dir=run_dir, half=half, stdout=stdout)


@pytest.fixture(scope="module")
def on_board(shown: Shown) -> Board:
    return board(shown.run_dir / "tensorboard")


def numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of a metrics line, said plainly: keys of numbers, and of numbers by layer."""
    for key, value in row.items():
        if isinstance(value, int | float) and key != "step":
            yield key, value
        elif isinstance(value, list) and key.startswith(("moe/layer/", "train/")):
            yield from ((f"{key}/{layer:02d}", one) for layer, one in enumerate(value))


def by_tag(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for tag, value in numbers(row):
            found.setdefault(tag, []).append((row["step"], value))
    return found


def rounded(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, float(np.float32(value))) for step, value in points]


def test_a_resumed_run_has_every_value_of_its_record_on_the_board_once(
    shown: Shown, on_board: Board
) -> None:
    """Steps 13 and 14 were on the board when the kill came, and were rolled back."""
    early = board(shown.half / "tensorboard").scalars["train/nll"]
    assert [step for step, _ in early][:14] == [*range(1, 15)]
    wanted = by_tag(lines(shown.run_dir / "metrics.jsonl"))
    assert len(wanted) > 30
    assert [step for step, _ in wanted["train/nll"]] == [*range(1, 25)]
    own = {t: p for t, p in on_board.scalars.items() if not t.startswith("eval/")}
    assert own == {tag: rounded(points) for tag, points in wanted.items()}
    assert len([*(shown.run_dir / "tensorboard").iterdir()]) == 1


def test_loads_are_a_histogram_a_layer(shown: Shown, on_board: Board) -> None:
    rows = lines(shown.run_dir / "metrics.jsonl")
    assert on_board.histograms.keys() == {"moe/load/00", "moe/load/01"}
    for layer in (0, 1):
        of_layer = on_board.histograms[f"moe/load/{layer:02d}"]
        assert [step for step, _ in of_layer] == [row["step"] for row in rows]
        for row, (_, found) in zip(rows, of_layer, strict=True):
            loads = row["moe/load"][layer]
            assert (found.num, found.min, found.max) == (8, min(loads), max(loads))
            assert found.sum == pytest.approx(sum(loads), rel=1e-12)
            assert sum(found.bucket) == 8


def test_evals_and_events_are_on_the_board(shown: Shown, on_board: Board) -> None:
    evals = lines(shown.run_dir / "evals.jsonl")
    for key in ("nll", "bits_per_byte"):
        wanted = rounded([(row["step"], row[key]) for row in evals])
        assert on_board.scalars[f"eval/holdout/{key}"] == wanted
    assert on_board.words["events/resume"] == [(12, "from checkpoint 12")]
    assert [step for step, _ in on_board.words["events/checkpoint"]] == [6, 12, 18, 24]
    assert [step for step, _ in on_board.words["events/done"]] == [24]


def test_points_have_the_time_of_the_run(shown: Shown, on_board: Board) -> None:
    """That of its start and the seconds of the record, also of what was written anew."""
    rows = lines(shown.run_dir / "metrics.jsonl")
    assert len({round(on_board.times[r["step"]] - r["seconds"], 2) for r in rows}) == 1


def test_wandb_has_the_whole_run_in_its_last_start(shown: Shown) -> None:
    starts = sorted((shown.run_dir / "wandb").glob("offline-run-*"))
    assert len(starts) == 2
    rows = {row["_step"]: row for row in wandb_rows(shown.run_dir / "wandb" / "latest-run")}
    wanted = lines(shown.run_dir / "metrics.jsonl")
    assert rows.keys() == {0, *range(1, 25)}
    for row in wanted:
        found = rows[row["step"]]
        assert {tag: found.get(tag) for tag, _ in numbers(row)} == dict(numbers(row))
        assert sum(found["moe/load/01/values"]) == 8
    evals = {row["step"]: row["nll"] for row in lines(shown.run_dir / "evals.jsonl")}
    assert {s: r["eval/holdout/nll"] for s, r in rows.items() if s in evals} == evals
    assert rows[12]["events/resume"] == "from checkpoint 12"


def test_what_watches_a_run_changes_no_loss(shown: Shown, straight: Path) -> None:
    assert metrics(shown.run_dir) == metrics(straight)


def test_a_quiet_run_says_its_end_alone(shown: Shown) -> None:
    first = shown.stdout.splitlines()[0]
    assert first.startswith(("done in ", "alarm: "))
    assert "step 24/24" not in shown.stdout


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[RunRecord]:
    """With a board, at step 0."""
    made = RunRecord(
        tmp_path / "run", writes=True, viewers=[TensorBoard(tmp_path / "run" / "board")]
    )
    made.begin(small())
    made.rewind(0)
    with made.viewing():
        yield made


def row(step: int, nll: float) -> dict[str, Any]:
    return {"step": step, "seconds": 2.0 * step, "train/nll": nll}


def held_out(step: int, nll: float) -> dict[str, Any]:
    return {"step": step, "tokens": step, "set": "h", "set_fingerprint": "f", "nll": nll}


def test_other_values_after_a_rollback_replace_those_before(kept: RunRecord) -> None:
    kept.event("start", step=0, why="a config")
    for step in range(1, 6):
        kept.append("metrics.jsonl", row(step, 1.0))
        kept.evaluated(held_out(step, 1.0))
    kept.event("alarm", step=4, why="of steps that were rolled back")
    kept.rewind(2)
    kept.event("resume", step=2, why="from checkpoint 2")
    kept.append("metrics.jsonl", row(3, 3.0))
    kept.evaluated(held_out(3, 1.0))  # as before: the record has it already
    kept.evaluated(held_out(4, 4.0))
    found = board(kept.folder / "board")
    assert found.scalars["train/nll"] == [(1, 1.0), (2, 1.0), (3, 3.0)]
    assert found.scalars["eval/h/nll"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 4.0)]
    assert found.words == {
        "events/start": [(0, "a config")],
        "events/resume": [(2, "from checkpoint 2")],
    }


def test_a_start_from_nothing_shows_nothing_of_another_past(kept: RunRecord) -> None:
    """Killed before its first checkpoint: what it logged comes again."""
    kept.event("start", step=0, why="one")
    kept.evaluated(held_out(0, 9.0))
    kept.append("metrics.jsonl", row(1, 5.0))
    kept.rewind(0)
    kept.event("start", step=0, why="two")
    kept.evaluated(held_out(0, 9.0))
    assert board(kept.folder / "board").scalars == {
        "eval/h/nll": [(0, 9.0)],
        "eval/h/tokens": [(0, 0.0)],
    }
    kept.append("metrics.jsonl", row(1, 5.0))
    kept.rewind(1)
    found = board(kept.folder / "board")
    assert found.words == {"events/start": [(0, "two")]}
    assert found.scalars["eval/h/nll"] == [(0, 9.0)]
    assert found.scalars["train/nll"] == [(1, 5.0)]


def test_each_line_is_on_the_board_at_once(kept: RunRecord) -> None:
    kept.append("metrics.jsonl", row(1, 5.0))
    assert board(kept.folder / "board").scalars["train/nll"] == [(1, 5.0)]


def test_a_board_that_cannot_be_written_ends_no_run(
    kept: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next start writes all of it. A file stands where the folder goes, until it does not."""
    shutil.rmtree(kept.folder / "board")
    (kept.folder / "board").write_text("")
    kept.rewind(0)
    kept.append("metrics.jsonl", row(1, 5.0))
    kept.append("metrics.jsonl", row(2, 4.0))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "board: " in said[0] and "until the next start" in said[0]
    (kept.folder / "board").unlink()
    kept.rewind(2)
    assert board(kept.folder / "board").scalars["train/nll"] == [(1, 5.0), (2, 4.0)]


def test_a_value_that_is_not_finite_is_shown_as_it_is(kept: RunRecord) -> None:
    kept.append("metrics.jsonl", row(1, math.nan))
    ((step, value),) = board(kept.folder / "board").scalars["train/nll"]
    assert step == 1 and math.isnan(value)


def test_points_of_a_line() -> None:
    """Numbers by name; by layer one each; what is not known yet, and words, are none."""
    line = {"step": 3, "a": 1, "b": None, "moe/layer/dead": [0, 2], "moe/load": [[0.5, 1.5]]}
    assert [*points("metrics.jsonl", line)] == [
        ("a", 1.0),
        ("moe/layer/dead/00", 0.0),
        ("moe/layer/dead/01", 2.0),
        ("moe/load/00", [0.5, 1.5]),
    ]
    line = {"step": 3, "set": "h", "nll": 2.0, "domains": {"py": {"nll": 1.0}}}
    assert [*points("evals.jsonl", line)] == [("eval/h/nll", 2.0), ("eval/h/domains/py/nll", 1.0)]


@pytest.mark.parametrize(
    ("log", "module", "words"),
    [
        (
            LogConfig(tensorboard=True),
            "tensorboardX",
            r"log.tensorboard=True .*jaxmoe\[tensorb",
        ),
        (LogConfig(wandb="mine"), "wandb", r"log.wandb=mine needs .* wandb, .*jaxmoe\[wandb\]"),
    ],
)
def test_a_tool_that_is_not_installed_is_named_with_its_extra(
    log: LogConfig, module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewers.check(log)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else name)
    viewers.check(LogConfig())
    with pytest.raises(UserError, match=words):
        viewers.check(log)


def test_a_run_may_go_on_watched_by_other_tools(kept: RunRecord) -> None:
    log = LogConfig(tensorboard=True, wandb="mine", terminal="quiet", profile_at=(3,))
    check_directory(kept.folder, replace(small(), log=log), "must")
