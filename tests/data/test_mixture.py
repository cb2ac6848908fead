"""The stream is a pure function of (seed, config, step), and reads what the plan says, exactly."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import EOT, SPECIALS, batch_of, numbered, places, plans

from jaxmoe.config import (
    BatchStage,
    Config,
    DataConfig,
    LengthStage,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
)
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.data import mixture
from jaxmoe.data.loader import Packed
from jaxmoe.data.mixture import Mixture
from jaxmoe.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """So that a short run has several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(mixture, "BLOCK", 16)
    yield
    patch.undo()


@given(plans())
@settings(max_examples=120, deadline=None)
def test_each_token_is_read_as_often_as_planned(plan: Any):
    """Whole epochs give each token once, the last one those of its first windows; none twice."""
    config, sources = plan
    stream = Mixture(config, sources, SPECIALS)
    seen = places(config, stream)
    assert max(seen.values()) == 1
    assert sum(seen.values()) == curriculum(config).tokens(config.train.steps)
    for name, used in stream.used.items():
        epochs = Counter(epoch for source, epoch, _ in seen if source == name)
        assert sum(epochs.values()) == used.tokens - used.skipped
        for epoch in range(used.tokens // used.epoch):
            tokens = sorted(t for source, e, t in seen if (source, e) == (name, epoch))
            if not used.skipped:
                assert tokens == list(range(used.epoch))
        assert sources[name].tokens - 1 - used.epoch < config.train.seq_len
        assert used.skipped == 0 or config.data.packing == "best_fit"


@given(plans())
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_read_to_its_end_before_the_next(plan: Any):
    """So that nothing comes twice before all has come once, however far a block reaches."""
    config, sources = plan
    stream = Mixture(config, sources, SPECIALS)
    last: dict[str, int] = {}
    for number in range(stream.sequences):
        sample = stream.sample(number)
        spans = stream.spans(sample)
        assert spans[0].epoch >= last.get(sample.source, 0)
        last[sample.source] = spans[0].epoch


@given(plans(), st.sampled_from([1, 2, 3, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_hosts_and_any_start_see_the_same_stream(plan: Any, hosts: int, data: st.DataObject):
    """Each host reads its own rows; a stream that is opened at a step needs none before."""
    config, sources = plan
    straight = Mixture(config, sources, SPECIALS)
    whole = [straight.rows(s, 0, batch_of(config, s)) for s in range(config.train.steps)]
    step = data.draw(st.integers(0, config.train.steps - 1))
    opened = Mixture(config, sources, SPECIALS)
    for at in (step, *range(step + 1, min(step + 3, config.train.steps))):
        batch = batch_of(config, at)
        cuts = [batch * host // hosts for host in range(hosts + 1)]
        parts = [opened.rows(at, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        for mine, theirs in zip(zip(*parts, strict=True), whole[at], strict=True):
            assert (np.concatenate(mine) == theirs).all()


@given(plans(fim=True))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_tokens_of_their_places(plan: Any):
    """Inputs and targets; where a span ends the next token is a target only if it begins a document
    after an eot; a document of a row never crosses a seam."""
    config, sources = plan
    stream = Mixture(config, sources, SPECIALS)
    for step in range(min(6, config.train.steps)):
        rows = stream.rows(step, 0, batch_of(config, step))
        assert isinstance(rows, Packed) == config.data.document_mask
        samples = stream.samples(step, 0, batch_of(config, step))
        assert rows.tokens.shape == (len(samples), samples[0].length + 1)
        for row, sample in enumerate(samples):
            at, seams = 0, []
            for epoch, start, stop in (spans := stream.spans(sample)):
                view, n = stream.view(sample.source, epoch), stop - start
                assert rows.tokens[row, at : at + n].tolist() == view.read(start, stop).tolist()
                at += n
                if at < sample.length:
                    begins = start == 0 or view.read(start - 1, start)[0] == EOT
                    seams.append((at, begins))
            assert rows.tokens[row, at] == view.read(stop, stop + 1)[0]
            fair = np.ones(sample.length)
            for (at, _), (epoch, start, _) in zip(seams, spans[1:], strict=True):
                view = stream.view(sample.source, epoch)
                begins = start == 0 or view.read(start - 1, start)[0] == EOT
                fair[at - 1] = begins and rows.tokens[row, at - 1] == EOT
            assert rows.weights[row].tolist() == fair.tolist()
            if isinstance(rows, Packed):
                ends = rows.tokens[row, :-1] == EOT
                ends[[at - 1 for at, _ in seams]] = True
                by_hand = [1 + int(ends[:i].sum()) for i in range(sample.length)]
                assert rows.documents[row].tolist() == by_hand


@given(plans())
@settings(max_examples=60, deadline=None)
def test_the_batch_does_not_change_the_order(plan: Any):
    """Another ramp of the batch gives the same sequences one after another."""
    config, sources = plan
    data = replace(config.data, phases=())
    plain = replace(config, data=data, train=replace(config.train, length_ramp=(), batch_ramp=()))
    ramped = replace(plain, train=replace(plain.train, batch_ramp=config.train.batch_ramp))
    orders = []
    for one in (plain, ramped):
        stream, order = Mixture(one, sources, SPECIALS), []
        for step in range(one.train.steps):
            order += stream.samples(step, 0, batch_of(one, step))
        orders.append(order)
    # Of whole blocks: the last one of a run ends with it, so that the run's counts are exact.
    size = Mixture(plain, sources, SPECIALS)._block_size(stream._segments[0])
    n = min(map(len, orders)) // size * size
    if not any(source.epochs for source in config.data.sources):
        assert orders[0][:n] == orders[1][:n]


def two(**data: Any) -> tuple[Config, dict[str, Any]]:
    mix = (SourceConfig(name="code", weight=3.0), SourceConfig(name="text", weight=1.0))
    config = Config(
        model=ModelConfig(loss_chunk=1),
        data=replace(DataConfig(sources=mix), **data),
        train=TrainConfig(steps=50, batch_size=8, seq_len=4),
    )
    sources = {"code": numbered("code", [30] * 20), "text": numbered("text", [7] * 20, 10_000)}
    return config, sources


def shares(config: Config, stream: Mixture, first: int, last: int) -> dict[str, Fraction]:
    found: Counter[str] = Counter()
    for step in range(first, last):
        found.update(s.source for s in stream.samples(step, 0, batch_of(config, step)))
    return {name: Fraction(n, sum(found.values())) for name, n in found.items()}


def test_the_mix_is_exact_and_changes_at_its_tokens():
    """320 tokens are 10 steps of 32; the phase begins with the first step after 330."""
    phase = PhaseConfig(tokens=330, weights=(("text", 1.0), ("code", 0.25)))
    config, sources = two(phases=(phase,))
    stream = Mixture(config, sources, SPECIALS)
    assert [s.step for s in curriculum(config).stretches] == [0, 11]
    assert shares(config, stream, 0, 11) == {"code": Fraction(3, 4), "text": Fraction(1, 4)}
    assert shares(config, stream, 11, 50)["text"] == pytest.approx(0.8, abs=1 / (39 * 8))
    for step in (3, 20):  # in every block of 16
        assert shares(config, stream, 2 * step // 2, 2 * step // 2 + 1).keys() <= {"code", "text"}
    only = PhaseConfig(tokens=330, weights=(("text", 1.0),))
    config, sources = two(phases=(only,))
    assert shares(config, Mixture(config, sources, SPECIALS), 11, 50) == {"text": 1}


@given(st.lists(st.floats(2**-10, 128, width=32), min_size=1, max_size=9), st.integers(0, 10**15))
def test_counts_stay_next_to_the_exact_share_for_ever(weights: list[float], n: int):
    exact = [Fraction(str(w)) for w in weights]
    segment = mixture._Segment(0, n, 1, mixture._shares(exact), (0,) * len(exact))
    counts, later = segment.counts(n), segment.counts(n + 1000)
    assert sum(counts) == n and sum(later) == n + 1000
    assert all(b >= a >= 0 for a, b in zip(counts, later, strict=True))
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count - n * weight / sum(exact)) <= len(weights)


def test_a_plan_over_the_cap_is_refused_with_its_numbers():
    """1200 tokens of code at 3/4 of 1600; its row has 620 and one that nothing follows."""
    config, sources = two()
    over = replace(config.data.sources[0], epochs=1.9)
    config = replace(config, data=replace(config.data, sources=(over, config.data.sources[1])))
    with pytest.raises(UserError, match="1,200 tokens of source 'code', 1.94 times its 620.*=1.9"):
        Mixture(config, sources, SPECIALS)
    enough = replace(over, epochs=1.94)
    held = replace(config.data, sources=(enough, config.data.sources[1]))
    assert Mixture(replace(config, data=held), sources, SPECIALS).used["code"].tokens == 1200


def test_a_source_stops_at_its_cap_and_the_others_share_its_weight():
    config, sources = two(on_cap="redistribute")
    capped = replace(config.data.sources[0], epochs=1.0)
    config = replace(config, data=replace(config.data, sources=(capped, config.data.sources[1])))
    stream = Mixture(config, sources, SPECIALS)
    assert stream.used["code"].tokens == 620
    assert stream.used["text"].tokens == 1600 - 620
    late = shares(config, stream, 620 * 4 // 3 // 32 + 1, 50)
    assert late == {"text": 1}
    both = tuple(replace(s, epochs=1.0) for s in config.data.sources)
    with pytest.raises(UserError, match="after 780 tokens no source is left"):
        Mixture(replace(config, data=replace(config.data, sources=both)), sources, SPECIALS)


def test_a_source_that_has_ended_rests_through_a_change_of_length():
    """best_fit moves on to the next window, at 616, which is beyond the cap of 613."""
    config, sources = two(on_cap="redistribute", packing="best_fit")
    capped = replace(config.data.sources[0], epochs=0.99)
    ramp = (LengthStage(tokens=0, seq_len=2), LengthStage(tokens=1000, seq_len=4))
    config = replace(
        config,
        data=replace(config.data, sources=(capped, config.data.sources[1])),
        train=replace(config.train, length_ramp=ramp),
    )
    used = Mixture(config, sources, SPECIALS).used
    assert (used["code"].tokens, used["code"].skipped) == (616, 4)
    assert used["text"].tokens - used["text"].skipped == 1600 - 612


def test_a_longer_run_begins_alike():
    """Also where the shorter one ends before the longest sequences come."""
    ramp = (LengthStage(tokens=0, seq_len=2), LengthStage(tokens=800, seq_len=4))
    config, sources = two()
    longer = replace(config, train=replace(config.train, length_ramp=ramp))
    shorter = replace(longer, train=replace(longer.train, steps=20))
    orders = []
    for one in (longer, shorter):
        stream = Mixture(one, sources, SPECIALS)
        orders.append([stream.spans(stream.sample(i)) for i in range(320)])
    assert orders[0] == orders[1]


def test_mistakes_are_named():
    config, sources = two()
    missing = {"code": sources["code"]}
    with pytest.raises(UserError, match="no source 'text' in the data set; it has 'code'"):
        Mixture(config, missing, SPECIALS)
    with pytest.raises(UserError, match="'text' has 4 tokens: a sequence of 4 needs 5"):
        Mixture(config, {**sources, "text": numbered("text", [2])}, SPECIALS)
    turned = tuple(replace(s, fim_rate=0.5) for s in config.data.sources)
    wanting = replace(config, data=replace(config.data, sources=turned))
    with pytest.raises(UserError, match="'code': fim_rate needs a tokenizer with fim_prefix"):
        Mixture(wanting, sources, {"eot": EOT})


def test_without_a_mix_sources_come_by_their_size():
    config, sources = two(sources=())
    used = Mixture(config, sources, SPECIALS).used
    whole = sum(source.tokens for source in sources.values())
    for name, source in sources.items():
        assert used[name].tokens == pytest.approx(1600 * source.tokens / whole, abs=8)


def test_first_times_end_with_the_first_epoch():
    """Of each source on its own: 620 tokens of code, 160 of text, and then nothing more."""
    config, sources = two()
    stream = Mixture(config, sources, SPECIALS)
    seen = dict.fromkeys(stream.names, 0)
    for step in range(50):
        fresh = stream.first_times(step, 0, 8)
        assert (
            fresh == np.concatenate([stream.first_times(step, i, i + 1) for i in range(8)])
        ).all()
        for row, sample in zip(fresh, stream.samples(step, 0, 8), strict=True):
            assert row.sum() == (sample.at + 4 <= stream.used[sample.source].epoch)
            assert not row.any() or stream.names[int(row.argmax())] == sample.source
            seen[sample.source] += 4 * int(row.sum())
    assert seen == {"code": 620, "text": 160}


class Virtual:
    """10^9 documents of 1000 tokens that lie nowhere."""

    name, domain = "virtual", ""
    documents = 10**9
    tokens = 1 + documents * 1000

    def read(self, start: int, stop: int) -> np.ndarray:
        at = np.arange(start, stop)
        return np.where(at % 1000 == 0, EOT, 5 + at % 997).astype(np.int32)

    def bounds(self, document: int) -> tuple[int, int]:
        return 1 + document * 1000, 1 + (document + 1) * 1000

    def find(self, token: int) -> int:
        return (token - 1) // 1000 if token else -1


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_thousand_million_documents_take_no_memory(packing: Any, rate: float):
    """Any of 20,000,000 steps is read at once; what is kept is bounded."""
    mix = (SourceConfig(name="virtual", fim_rate=rate),)
    config = Config(
        model=ModelConfig(loss_chunk=1),
        data=DataConfig(sources=mix, packing=packing, document_mask=True),
        train=TrainConfig(
            steps=20_000_000,
            batch_size=16,
            seq_len=2048,
            batch_ramp=(BatchStage(tokens=10**11, batch_size=24),),
        ),
    )
    check(config)
    tracemalloc.start()
    try:
        stream = Mixture(config, {"virtual": Virtual()}, SPECIALS)
        for step in range(3, 20_000_000, 999_983):
            batch = stream.rows(step, 0, 2)
            again = stream.rows(step, 1, 2)
            assert (batch.tokens[1] == again.tokens[0]).all()
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    assert stream.used["virtual"].tokens > 10**11
