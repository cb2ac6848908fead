"""Batch and length change while a run goes on: what it counts, and how it goes on after a kill."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from processes import TIMED, events
from small import small
from stream_cases import EOT, SPECIALS, numbered

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import (
    BatchStage,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    LengthStage,
    OptimConfig,
    RouterConfig,
    SourceConfig,
    TrainConfig,
)
from jaxmoe.curriculum import curriculum
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.data.loader import Packed
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.store import StoredSource
from jaxmoe.forecast.__main__ import load_run
from jaxmoe.model.cost import cost
from jaxmoe.model.lm import lm_loss
from jaxmoe.optim import rates, relative_path
from jaxmoe.run import parts
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.state import init_state, make_optimizer
from jaxmoe.train import _tokens

# 24 x 8 tokens until 500 are consumed (3 steps of 192), 8 x 24 until 1000 (3 more), then 16 x 24.
SHAPES = [(24, 8)] * 3 + [(8, 24)] * 3 + [(16, 24)] * 5
STEPS = len(SHAPES)
PARTS: list[int] = []  # that the batch of each compiled step is computed in


def ramped() -> Config:
    return replace(
        small(),
        data=replace(small().data, packing="best_fit", document_mask=True),
        optim=OptimConfig(warmup_steps=3, batch_rule="sqrt"),
        train=TrainConfig(
            steps=STEPS,
            batch_size=8,
            seq_len=24,
            batch_ramp=(BatchStage(tokens=1000, batch_size=16, accumulate=2),),
            length_ramp=(LengthStage(tokens=0, seq_len=8), LengthStage(tokens=500, seq_len=24)),
            log_every=1,
        ),
        eval=EvalConfig(every=STEPS, batch_size=64),
        checkpoint=CheckpointConfig(every=2, keep=9),
        forecast=ForecastConfig(first=STEPS, every=STEPS),
    )


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    data = replace(small().data, cache=str(text_cache))
    return prepare(data, small().model.vocab_size)


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, *, alarm: bool = False) -> None:
        self.notes.append(text)


def trained(mesh: Mesh, corpus: Corpus, run_dir: Path) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = Trainer(ramped(), mesh, corpus, run_dir, Noting(), 1e12)
    trainer.run(trainer.prepare())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return trainer, [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def ran(
    mesh: Mesh, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, list[dict[str, Any]]]:
    plain, patch = parts.train_step, pytest.MonkeyPatch()

    class Spied:
        def lower(self, state: Any, batch: Any, config: Config) -> Any:
            PARTS.append(config.train.accumulate)
            return plain.lower(state, batch, config)

    patch.setattr(parts, "train_step", Spied())
    try:
        return trained(mesh, corpus, tmp_path_factory.mktemp("ramped") / "run")
    finally:
        patch.undo()


def test_tokens_and_flops_are_those_consumed(ran: Any):
    trainer, rows = ran
    tokens = np.cumsum([batch * length for batch, length in SHAPES])
    assert [row["tokens"] for row in rows] == tokens.tolist()
    per_token = {length: cost(small().model, length).flops_per_token for length in (8, 24)}
    assert per_token[8] < per_token[24]
    flops = np.cumsum([batch * length * per_token[length] for batch, length in SHAPES])
    np.testing.assert_allclose([row["flops"] for row in rows], flops, rtol=1e-12)
    evals = (trainer.record.folder / "evals.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in evals] == [0, tokens[-1]]


def test_each_shape_is_compiled_once_and_announced(ran: Any):
    trainer, _ = ran
    shapes = [(s.batch, s.length, s.accumulate) for s in trainer._compiled]
    assert shapes == [(24, 8, 1), (8, 24, 1), (16, 24, 2)]
    assert PARTS == [1, 1, 2]
    said = [note for note in trainer.display.notes if note.startswith("compiled the step for")]
    sizes = [note.split(" for ")[1].split(" in ")[0] for note in said]
    assert sizes == ["24 x 8 tokens", "8 x 24 tokens", "16 x 24 tokens"]
    assert [row["step"] for row in events(trainer.record.folder, "shape")] == [0, 3, 6]


def test_the_rate_follows_the_batch_and_the_register_has_the_same_path(ran: Any, tmp_path: Path):
    """By the square root, relative to the largest batch."""
    trainer, rows = ran
    config, found = trainer.config, [row["train/lr"] for row in rows]
    plain = relative_path(config.optim, STEPS) * config.optim.lr
    factor = [math.sqrt(batch * length / 384) for batch, length in SHAPES]
    np.testing.assert_allclose(found, plain * factor, rtol=1e-6)
    (tmp_path / "config.json").write_text("{}")
    plan = {"lr": rates(config).tolist(), **_tokens(config)}
    (tmp_path / "schedule.json").write_text(json.dumps(plan))
    shutil.copy(trainer.record.folder / "evals.jsonl", tmp_path / "evals.jsonl")
    schedule = load_run(tmp_path).schedule
    assert schedule.tokens.tolist() == [row["tokens"] for row in rows]
    np.testing.assert_allclose(schedule.lr, np.array(found) / max(found), rtol=1e-6)
    assert trainer.forecast._schedule.tokens.tolist() == schedule.tokens.tolist()


def test_the_update_follows_the_batch(mesh: Mesh):
    """Not only the rate in the record: the first update, at half of the largest batch."""
    config = ramped()
    plain = replace(config, optim=replace(config.optim, batch_rule="none"))
    params = init_state(config, mesh).params

    def first(one: Config) -> Any:
        tx = make_optimizer(one)
        return jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)

    for mine, whole in zip(*map(jax.tree.leaves, (first(config), first(plain))), strict=True):
        np.testing.assert_allclose(mine, np.sqrt(0.5) * np.asarray(whole), rtol=1e-5, atol=1e-12)


def test_code_of_several_sources_adds_up(mesh: Mesh):
    """The loss by source, of those rows that count; the sum over all is the step's own."""
    sources = {"one": numbered("one", [20] * 8, 4), "two": numbered("two", [9] * 9, 180)}
    config = replace(
        small(),
        data=DataConfig(sources=tuple(SourceConfig(name=name) for name in sources)),
        train=TrainConfig(steps=1, batch_size=6, seq_len=24),
    )
    stream = Mixture(config, sources, SPECIALS)
    rows, told = stream.rows(0, 0, 6), stream.first_times(0, 0, 6)
    put = lambda a: jax.device_put(a, mesh_lib.batch_sharding(mesh, 2))  # noqa: E731
    weights = np.random.default_rng(0).uniform(0, 2, rows.weights.shape).astype(np.float32)
    params = init_state(config, mesh).params

    @jax.jit
    def loss(tokens_BL: Any, weights_BL: Any, sources_BY: Any) -> Any:
        shifted = tokens_BL[:, :-1], tokens_BL[:, 1:]
        return lm_loss(params, *shifted, weights_BL, config.model, sources_BY=sources_BY)[0]

    whole = loss(put(rows.tokens), put(weights), put(told))
    assert told.sum(0).min() >= 1
    for source in range(2):
        own = weights * told[:, source : source + 1]
        alone = loss(put(rows.tokens), put(own), put(told))
        np.testing.assert_allclose(whole.nll_Y[source], alone.nll, rtol=1e-5)
        np.testing.assert_allclose(whole.weight_Y[source], own.sum(), rtol=1e-6)


def test_the_code_length_is_the_sum_of_the_losses(ran: Any):
    """No token comes twice here; with best_fit a few targets are left out at seams."""
    trainer, rows = ran
    last, drawn = rows[-1], curriculum(trainer.config).tokens(STEPS)
    assert 0.9 * drawn < last["data/code_tokens"] <= drawn
    before = [0, *(row["data/code_tokens"] for row in rows)]
    nats = sum(
        row["train/nll"] * (row["data/code_tokens"] - old)
        for row, old in zip(rows, before, strict=False)
    )
    assert last["data/code_bits"] == pytest.approx(nats / math.log(2), rel=1e-6)


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_run_resumed_within_a_ramp_goes_on_bit_for_bit(
    ran: Any, step: int, mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    """In the middle of each shape, and where one begins."""
    trainer, straight = ran
    run_dir = tmp_path / "run"
    shutil.copytree(trainer.record.folder, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    saved = json.loads((run_dir / f"checkpoints/{step}/meta/metadata").read_text())
    assert saved["tokens"] == sum(batch * length for batch, length in SHAPES[:step])
    resumed, rows = trained(mesh, corpus, run_dir)
    assert [row["step"] for row in events(run_dir, "resume")] == [step]
    assert rows == straight
    assert resumed.tokens == trainer.tokens


def test_a_run_of_two_sources_tells_their_code(mesh: Mesh, corpus: Corpus, tmp_path: Path):
    """Of a data set: one is not read to its end, the other again and again."""
    ends = np.fromfile(corpus.folder / "train.ends.bin", "<i8")
    train = corpus.train[:]
    short = int(np.argmax(ends > 300))  # documents
    sources = {
        "long": StoredSource("long", [train], ends),
        "short": StoredSource("short", [train[: ends[short]]], ends[: short + 1]),
    }
    mix = (SourceConfig(name="long"), SourceConfig(name="short", weight=3.0))
    whole = replace(corpus, sources=sources)
    config = replace(
        small(),
        data=replace(small().data, sources=mix),
        train=TrainConfig(steps=60, batch_size=8, seq_len=24, log_every=1),
        eval=EvalConfig(every=60, batch_size=64),
        checkpoint=CheckpointConfig(every=60),
        forecast=ForecastConfig(first=60, every=60),
    )
    trainer = Trainer(config, mesh, whole, tmp_path / "run", Silent(), 1e12)
    trainer.run(trainer.prepare())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert isinstance(trainer.stream, Mixture)
    used = trainer.stream.used
    assert used["short"].epochs > 1 > used["long"].epochs
    counted = [row["data/code_tokens/short"] for row in rows]
    assert counted[-1] == used["short"].epoch and counted[0] < counted[-1]
    assert rows[-1]["data/code_tokens/long"] == used["long"].tokens
    first = rows[0]  # all of its tokens are new
    nats = first["train/nll"] * first["data/code_tokens"]
    assert first["data/code_tokens"] == 8 * 24
    assert first["data/code_bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    parts = first["data/code_bits/long"] + first["data/code_bits/short"]
    assert first["data/code_bits"] == pytest.approx(parts, rel=1e-12)


def seamed(packing: Any) -> tuple[Config, dict[str, Any]]:
    """Two sources of ids of their own. With split, sequences of 24 after those of 8, so that some
    lie over the border of two windows, where no eot is."""
    sources = {
        "one": numbered("one", [5, 9, 30, 3, 7, 11, 2, 16, 8, 4], base=4),
        "two": numbered("two", [17, 5, 22, 6, 13, 9, 20, 10], base=130),
    }
    ramp = (LengthStage(tokens=0, seq_len=8), LengthStage(tokens=50, seq_len=24))
    alone = RouterConfig(load_balance_coef=0.0, z_coef=0.0)
    config = replace(
        small(),
        model=replace(small().model, router=alone),
        data=DataConfig(
            sources=(SourceConfig(name="one"), SourceConfig(name="two", weight=1.5)),
            packing=packing,
            document_mask=True,
        ),
        train=TrainConfig(steps=2, batch_size=6, seq_len=24, length_ramp=ramp),
    )
    return config, sources


def documents_of(tokens: list[int], sources: dict[str, Any]) -> list[tuple[str, int]]:
    """(source, document) of each token, by its id; an eot is of the token before it."""
    found = [("", -1)]
    for token in tokens:
        name, first = ("one", 4) if token < 130 else ("two", 130)
        found.append(found[-1] if token == EOT else (name, sources[name].find(token - first)))
    return found[1:]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_token_has_no_gradient_from_another_document(packing: str, mesh: Mesh):
    """The loss of one document touches the embeddings of no other, wherever they meet."""
    config, sources = seamed(packing)
    rows = Mixture(config, sources, SPECIALS).rows(1, 0, 6)
    assert isinstance(rows, Packed)
    params = init_state(config, mesh).params
    put = lambda a: jax.device_put(a, mesh_lib.batch_sharding(mesh, 2))  # noqa: E731
    shifted = put(rows.tokens[:, :-1]), put(rows.tokens[:, 1:])
    numbers = put(rows.documents)

    def loss(embed_VD: Any, weights_BL: Any) -> Any:
        mine = replace(params, embed_VD=embed_VD)
        # `total` alone has a gradient; the balance of experts is of all documents, so left out.
        return lm_loss(mine, *shifted, weights_BL, config.model, documents_BL=numbers)[0].total

    gradient, seams = jax.jit(jax.grad(loss)), 0
    for row, tokens in enumerate(rows.tokens[:, :-1].tolist()):
        mine = documents_of(tokens, sources)
        for document in set(mine):
            here = [d == document for d in mine]
            own = np.zeros((6, 24), np.float32)
            own[row] = here
            found = np.asarray(gradient(params.embed_VD, put(own * rows.weights)))
            touched = set(np.flatnonzero(np.abs(found).max(1)).tolist())
            assert touched or not (own * rows.weights).any()
            assert touched <= {EOT, *(t for t, h in zip(tokens, here, strict=True) if h)}
        pairs = zip(tokens, mine, mine[1:], strict=False)
        seams += sum(a != b and (token != EOT or packing == "best_fit") for token, a, b in pairs)
    assert seams >= 2
