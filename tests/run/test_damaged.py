"""Batches of a text that is damaged on the disk: the run stops, or leaves it out and says so."""

import hashlib
import json
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from small import small

from jaxmoe.config import Config, EvalConfig, ForecastConfig, TrainConfig, replace
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.data.damage import Damaged, Guard
from jaxmoe.data.store import StoredSource
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent

PARTS = 40  # shards of the training text; 56 of some 16,000 sequences are drawn


def config() -> Config:
    return replace(
        small(),
        train=TrainConfig(steps=7, batch_size=8, seq_len=24, log_every=1),
        eval=EvalConfig(every=7, batch_size=64),
        forecast=ForecastConfig(first=7, every=7),
    )


def guarded(corpus: Corpus, folder: Path, policy: Any, harmed: set[int]) -> Corpus:
    """The corpus with its text in shards in `folder`, some with a flipped bit."""
    guard, shards, dtype = Guard(policy), [], corpus.heldout.tokens.dtype
    for number, part in enumerate(np.array_split(corpus.train[:].astype(dtype), PARTS)):
        raw = bytearray(part.tobytes())
        row = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        raw[7] ^= number in harmed
        path = folder / f"train-{number:05d}.bin"
        path.write_bytes(raw)
        shards.append(guard.open_shard(path, dtype, row))
    train = StoredSource("train", shards, np.empty(0, np.int64))
    return with_(corpus, sources={"train": train}, guard=guard)


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    return prepare(replace(small().data, cache=str(text_cache)), small().model.vocab_size)


def trainer(corpus: Corpus, mesh: Mesh, run_dir: Path) -> Trainer:
    made = Trainer(config(), mesh, corpus, run_dir, Silent(), 1e12)
    made.record.begin(made.config)
    return made


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def drawn(one: Trainer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of the run's batches."""
    batches = [one._draw(step) for step in range(one.config.train.steps)]
    tokens, weights = zip(*((b.tokens_BL, b.weights_BL) for b in batches), strict=True)
    return np.concatenate(tokens), np.concatenate(weights)


def test_a_damaged_shard_ends_the_run_with_an_event_that_names_it(
    corpus: Corpus, mesh: Mesh, tmp_path: Path
):
    harmed = set(range(0, PARTS, 8))
    run_dir = tmp_path / "run"
    run = trainer(guarded(corpus, tmp_path, "stop", harmed), mesh, run_dir)
    with pytest.raises(Damaged, match=r"train-000(00|08|16|24|32).bin has changed") as caught:
        drawn(run)
    (event,) = events(run_dir)
    assert event["what"] == "damaged"
    assert str(caught.value).startswith(event["why"])


def test_a_damaged_shard_is_left_out_of_the_loss(corpus: Corpus, mesh: Mesh, tmp_path: Path):
    """The order stays, and every other token with it."""
    harmed = set(range(0, PARTS, 8))
    whole = drawn(trainer(corpus, mesh, tmp_path / "whole"))
    run = trainer(guarded(corpus, tmp_path, "skip", harmed), mesh, tmp_path / "run")
    tokens, weights = drawn(run)
    lost = weights == 0
    assert 0.02 < lost.mean() < 0.5
    assert (weights[~lost] == 1).all()
    assert (tokens[:, 1:][~lost] == whole[0][:, 1:][~lost]).all()
    assert (tokens[:, 1:][lost] == corpus.tokenizer.eot).all()
    assert (whole[1] == 1).all()
    told = [e["why"] for e in events(tmp_path / "run")]
    named = [why.partition("train-")[2][:5] for why in told]
    assert len(set(named)) == len(named) >= 1
    assert set(named) <= {f"{n:05d}" for n in harmed}
