"""Checkpoints of before consumed tokens were counted: they have a position in sequences alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh
from processes import TIMED, events
from small import small

from jaxmoe.config import CheckpointConfig, Config, EvalConfig, ForecastConfig, TrainConfig, replace
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.errors import UserError
from jaxmoe.run import seal
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent

OLD = ("step", "position", "data", "forecast", "seconds", "config")  # as it was until 068811b


def config() -> Config:
    return replace(
        small(),
        train=TrainConfig(steps=7, batch_size=8, seq_len=24, log_every=1),  # test_damaged's program
        eval=EvalConfig(every=7, batch_size=64),
        checkpoint=CheckpointConfig(every=4, keep=9),
        forecast=ForecastConfig(first=7, every=7),
    )


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    return prepare(replace(small().data, cache=str(text_cache)), small().model.vocab_size)


def trainer(corpus: Corpus, mesh: Mesh, run_dir: Path) -> Trainer:
    return Trainer(config(), mesh, corpus, run_dir, Silent(), 1e12)


def losses(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED and "code" not in k} for row in rows]


@pytest.fixture(scope="module")
def ran(corpus: Corpus, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("old") / "run"
    run = trainer(corpus, mesh, run_dir)
    run.run(run.prepare())
    return run_dir


def aged(ran: Path, into: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the run as it was at step 4, with an old checkpoint, and a change to it."""
    shutil.copytree(ran, into)
    shutil.rmtree(into / "checkpoints" / "7")
    file = into / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    assert meta["tokens"] == 4 * 8 * 24
    old = {key: meta[key] for key in OLD}
    change(old)
    file.write_text(json.dumps(old))
    seal.write(into / "checkpoints" / "4", ITEMS)
    return into


def test_a_position_alone_is_gone_on_from(ran: Path, corpus: Corpus, mesh: Mesh, tmp_path: Path):
    """To the same losses; of the online code it is said that its beginning is not known."""
    run_dir = aged(ran, tmp_path / "run", lambda meta: None)
    run = trainer(corpus, mesh, run_dir)
    state = run.prepare()
    assert (run.tokens, run.position) == (4 * 8 * 24, 4 * 8)
    run.run(state)
    assert [row["step"] for row in events(run_dir, "resume")] == [4]
    assert losses(run_dir) == losses(ran)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "data/code_bits" not in last


@pytest.mark.parametrize("change", [{"position": 33}, {"position": 31, "tokens": 768}], ids=str)
def test_a_position_of_another_config_is_refused_in_one_line(
    ran: Path, corpus: Corpus, mesh: Mesh, tmp_path: Path, change: dict[str, int]
):
    run_dir = aged(ran, tmp_path / "run", lambda meta: meta.update(change))
    said = f"checkpoint 4 was saved after .* in {change['position']} sequences.* after 768 in 32"
    with pytest.raises(UserError, match=said) as caught:
        trainer(corpus, mesh, run_dir).prepare()
    assert "\n" not in str(caught.value)
    assert losses(run_dir) == losses(ran)  # and nothing was cut off
