"""data.document_mask: what the model sees of a row that several documents share."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from small import small

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    RouterConfig,
    TrainConfig,
    replace,
)
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.model.lm import lm_loss
from jaxmoe.report.page import write
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.state import TrainState

TIMED = ("seconds", "perf/step_seconds", "perf/tokens_per_second", "perf/mfu", "perf/data_wait")
LENGTH = 24
STEPS = 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Documents of 4 to 24 bytes: most rows of 24 have two or more."""
    folder, rng = tmp_path_factory.mktemp("short"), random.Random(4)
    for number in range(300):
        package = folder / ("held" if number < 40 else "kept")
        package.mkdir(exist_ok=True)
        words = "".join(rng.choices("abcdefgh .", k=rng.randint(4, 24)))
        (package / f"{number}.txt").write_text(words)
    cache = str(folder.parent / "short-cache")
    return DataConfig(path=str(folder), holdout=("held",), tokenizer="bytes", cache=cache)


@pytest.fixture(scope="module")
def corpus(texts: DataConfig) -> Corpus:
    return prepare(texts, small().model.vocab_size)


def config(data: DataConfig, *, mask: bool, **model: Any) -> Config:
    """All that documents touch is in the model: experts after a dense layer, a further token."""
    return replace(
        small(),
        data=replace(data, document_mask=mask),
        model=replace(small().model, **model),
        train=TrainConfig(steps=STEPS, batch_size=8, seq_len=LENGTH, log_every=1),
        eval=EvalConfig(every=5, batch_size=16),
        checkpoint=CheckpointConfig(every=3, keep=3),
        forecast=ForecastConfig(first=5, every=5),
    )


def full(data: DataConfig, *, mask: bool) -> Config:
    router = RouterConfig(balance_bias_rate=0.01)
    return config(data, mask=mask, first_dense=1, n_mtp=1, router=router)


def trained(config: Config, mesh: Mesh, corpus: Corpus, run_dir: Path) -> tuple[Trainer, Any]:
    trainer = Trainer(config, mesh, corpus, run_dir, Silent(), 1e12)
    trainer.run(trainer.prepare())
    return trainer, rows(run_dir / "metrics.jsonl")


def rows(file: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in found]


@pytest.fixture(scope="module")
def masked(
    texts: DataConfig, mesh: Mesh, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Any]:
    run_dir = tmp_path_factory.mktemp("masked") / "run"
    return trained(full(texts, mask=True), mesh, corpus, run_dir)


def parameters(trainer: Trainer) -> TrainState:
    """As trained: a fresh model is too near to uniform for a difference to be seen."""
    return trainer.prepare()


def test_a_run_trains_and_its_losses_are_others_than_without(
    masked: tuple[Trainer, Any], texts: DataConfig, mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    """From the same parameters: already of the first step, and of the eval before it."""
    trainer, mine = masked
    _, theirs = trained(full(texts, mask=False), mesh, corpus, tmp_path / "run")
    assert [row["step"] for row in mine] == list(range(1, STEPS + 1))
    assert mine[-1]["train/nll"] < mine[0]["train/nll"]
    for mask, bare in zip(mine, theirs, strict=True):
        assert mask["train/nll"] != bare["train/nll"]
        assert mask["train/mtp_nll"] != bare["train/mtp_nll"]
    evals = [rows(run / "evals.jsonl") for run in (trainer.record.folder, tmp_path / "run")]
    assert evals[0][0]["nll"] != evals[1][0]["nll"]
    assert evals[0][0]["nll"] == pytest.approx(evals[1][0]["nll"], rel=0.05)


def test_a_resumed_run_goes_on_bit_for_bit(
    masked: tuple[Trainer, Any], mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    trainer, straight = masked
    run_dir = tmp_path / "run"
    shutil.copytree(trainer.record.folder, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "seconds": 1.0}) + "\n" for row in straight)
    )
    again, resumed = trained(trainer.config, mesh, corpus, run_dir)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["what"] == "resume"] == [3]
    assert resumed == straight
    assert again.evaluated == trainer.evaluated


def test_the_held_out_loss_is_that_of_each_piece_on_its_own(
    masked: tuple[Trainer, Any], mesh: Mesh
):
    """Every piece of a document that lies in a row, by itself, without any mask: what stands
    before it in the row, padding included, changes nothing."""
    trainer, _ = masked
    state = parameters(trainer)
    model, eot = trainer.config.model, trainer.corpus.tokenizer.eot
    loss = jax.jit(lambda params, x, y, w: lm_loss(params, x, y, w, model)[0].nll)
    tokens = trainer.corpus.heldout.tokens.astype(np.int32)
    pieces, start = [], 0
    for i in range(1, len(tokens)):  # the position i - 1 predicts i
        if i == len(tokens) - 1 or i % LENGTH == 0 or tokens[i - 1] == eot:
            pieces.append(tokens[start : i + 1])
            start = i
    assert len(pieces) > 1.3 * len(tokens) / LENGTH
    assert sum(len(piece) - 1 for piece in pieces) == len(tokens) - 1
    x, y = np.zeros((2, len(pieces), LENGTH), np.int32)
    w = np.zeros((len(pieces), LENGTH), np.float32)
    for n, piece in enumerate(pieces):
        size = len(piece) - 1
        x[n, :size], y[n, :size], w[n, :size] = piece[:-1], piece[1:], 1
    put = lambda a: jax.device_put(a, mesh_lib.batch_sharding(mesh, 2))  # noqa: E731
    nll = float(loss(state.params, put(x), put(y), put(w))) / (len(tokens) - 1)
    assert trainer.held_out_loss(state) == pytest.approx(nll, rel=1e-6)
    # The same parameters give another loss where documents see each other.
    open_ = replace(trainer.config, data=replace(trainer.config.data, document_mask=False))
    trainer.config, closed = open_, trainer.config
    assert trainer.held_out_loss(state) != pytest.approx(nll, rel=1e-6)
    trainer.config = closed


def test_a_batch_numbers_the_documents_of_its_rows(
    texts: DataConfig, corpus: Corpus, tmp_path: Path
):
    """On eight devices: each one's rows are read once, and no others."""
    axes = mesh_lib.AXES
    sizes = tuple(8 if axis == "data" else 1 for axis in axes)
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * len(axes))
    trainer = Trainer(config(texts, mask=True), mesh, corpus, tmp_path / "run", Silent(), 1e12)
    asked: list[tuple[int, int]] = []
    read = trainer.stream.rows

    def spy(position: int, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return read(position, start, stop)

    trainer.stream.rows = spy  # type: ignore[method-assign]
    trainer.next_batch()
    batch = trainer.next_batch()
    assert sorted(asked) == sorted([(i, i + 1) for i in range(8)] * 2)
    tokens, found = np.asarray(batch.tokens_BL), np.asarray(batch.documents_BL)
    assert (tokens == read(8, 0, 8)).all()
    assert found.dtype == np.int32
    eot = corpus.tokenizer.eot
    by_hand = [[1 + row[:i].count(eot) for i in range(LENGTH)] for row in tokens.tolist()]
    assert found.tolist() == by_hand
    assert found.max() > 2


def test_without_a_mask_a_row_is_one_document(
    texts: DataConfig, mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    trainer = Trainer(config(texts, mask=False), mesh, corpus, tmp_path / "run", Silent(), 1e12)
    assert trainer.next_batch().documents_BL is None


def test_a_dense_model_trains_and_has_a_page(
    texts: DataConfig, mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    """Nothing that reads its record may ask for experts."""
    dense = config(texts, mask=False, n_experts=1, top_k=1)
    _, found = trained(dense, mesh, corpus, tmp_path / "run")
    assert len(found) == STEPS
    assert not any(key.startswith("moe") for row in found for key in row)
    assert "it has no experts" in write(tmp_path / "run").read_text()


def test_layers_with_experts_are_told_apart_in_the_record(masked: tuple[Trainer, Any]):
    """One after the dense one, and the module for the further token."""
    trainer, found = masked
    for row in found:
        layers = {len(v) for k, v in row.items() if k.startswith("moe/layer/")}
        assert layers == {len(row["moe/load"])} == {2}
    assert found[0]["moe/layer/bias_high"] == [0, 0]
    assert found[-1]["moe/layer/bias_high"] != [0, 0]
    page = write(trainer.record.folder).read_text()
    assert '<option value="0">1</option>' in page
    assert '<option value="1">MTP 1</option>' in page
