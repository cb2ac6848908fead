"""Several held-out sets in one run, and the refusal of one that nobody compared."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from small import small

from jaxmoe.config import Config, EvalConfig, ForecastConfig, TrainConfig, replace
from jaxmoe.data.cache import Corpus, HeldOut, Texts, prepare
from jaxmoe.data.loader import Rows
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.run import record
from jaxmoe.run.evaluation import evaluate_sets, open_sets
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent


def config(*sets: str, tokens: int = 0) -> Config:
    return replace(
        small(),
        train=TrainConfig(steps=7, batch_size=8, seq_len=24, log_every=2),  # test_trainer's program
        eval=EvalConfig(every=1, batch_size=64, sets=sets, tokens=tokens),
        forecast=ForecastConfig(first=6, every=6),
    )


def held_out(corpus: Corpus, name: str, sizes: dict[str, Sequence[int]]) -> HeldOut:
    """A set of documents of `sizes` bytes, by domain, of the first text of the training source."""
    text, eot = corpus.train[1:], corpus.tokenizer.eot
    domains = {}
    for number, (domain, lengths) in enumerate(sizes.items()):
        rows = [np.append(text[500 * number : 500 * number + n], eot) for n in lengths]
        ends = 1 + np.cumsum([len(r) for r in rows])
        tokens = np.concatenate([[eot], *rows]).astype(text.dtype)
        domains[domain] = Texts(tokens=tokens, ends=ends, sizes=np.array(lengths))
    parts = [texts.tokens[1:] for texts in domains.values()]
    return HeldOut(
        name=name,
        tokens=np.concatenate([corpus.heldout.tokens[:1], *parts]),
        bytes=sum(sum(lengths) for lengths in sizes.values()),
        fingerprint=f"print of {name}",
        xz_bits_per_byte=3.0,
        domains=domains,
    )


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    """With two sets more, of which `mixed` has two domains."""
    made = prepare(replace(small().data, cache=str(text_cache)), small().model.vocab_size)
    others = (
        held_out(made, "mixed", {"code": [70, 30, 200], "prose": [150]}),
        held_out(made, "notes", {"prose": [90, 40]}),
    )
    overlap = dict(made.manifest["overlap"])
    source = made.manifest["sources"]["train"]["fingerprint"]
    overlap["print of mixed"] = {source: {"leaking": 2}}
    overlap["print of notes"] = {source: {"leaking": 0}}
    return with_(made, others=others, manifest={**made.manifest, "overlap": overlap})


def sums(batches: Sequence[Rows]) -> tuple[float, float]:
    """A loss that is the target's id over 100: any mistake in what is summed shows."""
    nats = sum(float((b.tokens[:, 1:] * b.weights).sum()) for b in batches)
    return nats / 100, sum(float(b.weights.sum()) for b in batches)


def test_each_set_and_domain_has_the_mean_over_its_own_tokens(corpus: Corpus):
    sets = open_sets(config("mixed", "holdout"), corpus)
    mixed, whole = evaluate_sets(sets, sums)
    assert (mixed["set"], whole["set"]) == ("mixed", "holdout")
    of = corpus.others[0]
    assert mixed["nll"] == pytest.approx(np.mean(of.tokens[1:].astype(float)) / 100)
    assert mixed["bits_per_byte"] == pytest.approx(
        np.sum(of.tokens[1:].astype(float)) / 100 / math.log(2) / 450
    )
    for domain, size in (("code", 300), ("prose", 150)):
        total = np.sum(of.domains[domain].tokens[1:].astype(float)) / 100
        line = mixed["domains"][domain]
        assert line["nll"] == pytest.approx(total / (len(of.domains[domain].tokens) - 1))
        assert line["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    assert "domains" not in whole
    assert whole["nll"] == pytest.approx(np.mean(corpus.heldout.tokens[1:].astype(float)) / 100)
    assert sets[0].bits_per_nat == pytest.approx(mixed["bits_per_byte"] / mixed["nll"])


def test_a_cap_evaluates_whole_documents_and_is_another_set(corpus: Corpus):
    (line,) = evaluate_sets(open_sets(config("mixed", tokens=300), corpus), sums)
    assert line["set_fingerprint"] == "print of mixed/2+1"
    code = corpus.others[0].domains["code"].tokens[1:103].astype(float)
    assert line["domains"]["code"]["nll"] == pytest.approx(np.mean(code) / 100)
    assert line["domains"]["code"]["bits_per_byte"] == pytest.approx(
        np.sum(code) / 100 / math.log(2) / 100
    )
    (prepared,) = open_sets(config("holdout", tokens=300), corpus)
    whole = corpus.heldout
    count = len(next(iter(prepared.held_out.domains.values())).ends)
    assert prepared.held_out.fingerprint == f"{whole.fingerprint}/{count}"
    assert (prepared.held_out.tokens == whole.tokens[: len(prepared.held_out.tokens)]).all()


def test_all_sets_without_a_choice_and_none_that_is_not_there(corpus: Corpus):
    assert [s.held_out.name for s in open_sets(config(), corpus)] == ["holdout", "mixed", "notes"]
    with pytest.raises(UserError, match="no held-out set 'note'; there is holdout, mixed, notes"):
        open_sets(config("note"), corpus)


def test_a_set_that_was_not_compared_with_this_training_text_is_refused(
    corpus: Corpus, mesh: Mesh, tmp_path: Path
):
    overlap = dict(corpus.manifest["overlap"])
    del overlap["print of notes"]
    bare = with_(corpus, manifest={**corpus.manifest, "overlap": overlap})
    said = "'?print of notes'? was not compared .* run python -m jaxmoe.data overlap"
    with pytest.raises(UserError, match=said):
        Trainer(config(), mesh, bare, tmp_path / "run", Silent(), 1e12)
    assert not (tmp_path / "run").exists()
    open_sets(config("mixed"), bare)  # what is not evaluated need not have been
    other = with_(corpus, fingerprint="0" * 16)
    with pytest.raises(UserError, match="training text 0{16} is not the data set's"):
        open_sets(config("mixed"), other)


@pytest.fixture(scope="module")
def ran(corpus: Corpus, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run_dir = tmp_path_factory.mktemp("sets") / "run"
    trainer = Trainer(config("mixed", "holdout"), mesh, corpus, run_dir, Silent(), 1e12)
    trainer.run(trainer.prepare())
    return trainer


def rows(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.record.folder / name).read_text().splitlines()]


def test_a_run_records_every_set_and_forecasts_the_first(ran: Trainer):
    evals = rows(ran, "evals.jsonl")
    assert [(e["step"], e["set"]) for e in evals] == [
        (step, name) for step in range(8) for name in ("mixed", "holdout")
    ]
    assert evals[0]["nll"] == pytest.approx(math.log(264), rel=0.1)
    lines = rows(ran, "forecasts.jsonl")
    assert {line["kind"] for line in lines} == {"forecast", "outcome"}
    assert {(line["set"], line["leaking"]) for line in lines} == {("mixed", 2)}
    assert {line["train_fingerprint"] for line in lines} == {ran.corpus.fingerprint}
    assert lines[-1]["loss"]["realised"] == evals[-2]["nll"]
    assert register.verify(ran.record.folder / "forecasts.jsonl") == []
    result = record.finished(ran.record.folder)
    assert result == evals[-2]
    events = [e["why"] for e in rows(ran, "events.jsonl") if e["what"] == "overlap"]
    assert events == ["2 training documents repeat held-out set mixed"]


def test_a_domain_is_evaluated_as_if_it_were_alone(ran: Trainer, corpus: Corpus, mesh: Mesh):
    code = corpus.others[0].domains["code"]
    alone = with_(corpus.others[0], tokens=code.tokens, bytes=int(code.sizes.sum()), domains={})
    lone = with_(corpus, others=(alone,))
    trainer = Trainer(config("mixed"), mesh, lone, ran.record.folder, Silent(), 1e12)
    state = trainer.prepare()
    last = rows(ran, "evals.jsonl")[-2]
    assert trainer.held_out_loss(state) == pytest.approx(last["domains"]["code"]["nll"], rel=1e-6)


def test_evals_that_come_again_are_written_once_a_set(ran: Trainer):
    before = rows(ran, "evals.jsonl")
    for line in before[-4:]:
        ran.record.evaluated(line)
    assert rows(ran, "evals.jsonl") == before
    changed = {**before[-1], "nll": 1.0}
    ran.record.evaluated(changed)
    assert rows(ran, "evals.jsonl") == [*before, changed]
