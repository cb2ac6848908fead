"""Fill in the middle: documents turned around, found without an index, and turned back."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import EOT, SPECIALS, numbered

from jaxmoe.data.fim import STRATUM, FimSource, restored, sentinels
from jaxmoe.data.store import StoredSource
from jaxmoe.errors import UserError

MARKS = sentinels(SPECIALS, "toy")
FIRST_VERSION = "1954cc62c659e06601422b87769f8943895bf1b63faa866f24e0b00d5dabca59"


def turned(lengths: list[int], rate: float = 0.5, spm: float = 0.5, key: int = 1) -> FimSource:
    return FimSource(numbered("toy", lengths), MARKS, rate=rate, spm=spm, key=key)


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=60)
rates = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@given(lengths, rates, rates, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_each_document_comes_back_whole(lengths: list[int], rate: float, spm: float, key: int):
    plain, source = numbered("toy", lengths), turned(lengths, rate, spm, key)
    n_turned = 0
    for document in range(source.documents):
        tokens = source.read(*source.bounds(document))
        original = plain.read(*plain.bounds(document))
        assert restored(tokens, MARKS).tolist() == original.tolist()
        n_turned += (extra := len(tokens) - len(original)) // 3
        assert extra in (0, 3)
        if extra:
            body = tokens.tolist()
            assert body[0] == MARKS.prefix and body[-1] == EOT
            assert body.index(MARKS.suffix) < body.index(MARKS.middle)
    assert n_turned == int(rate * source.documents + 0.5)
    assert source.tokens == plain.tokens + 3 * n_turned


@given(lengths, rates, st.integers(0, 10**6), st.data())
@settings(max_examples=100, deadline=None)
def test_it_reads_as_any_source(lengths: list[int], rate: float, key: int, data: st.DataObject):
    """Documents follow each other without a gap; any part is that of the whole; each token knows
    its document."""
    source = turned(lengths, rate, 0.5, key)
    whole = source.read(0, source.tokens)
    assert len(whole) == source.tokens and whole[0] == EOT
    before = 1
    for document in range(source.documents):
        start, stop = source.bounds(document)
        assert start == before
        assert {source.find(token) for token in range(start, stop)} == {document}
        before = stop
    assert before == source.tokens and source.find(0) == -1
    start = data.draw(st.integers(0, source.tokens))
    stop = data.draw(st.integers(start, source.tokens))
    assert source.read(start, stop).tolist() == whole[start:stop].tolist()


def test_where_it_is_turned_is_even():
    """Prefix, middle and suffix of a long document are a third each on average, both ways."""
    n = 4000
    source = turned([30] * n, rate=1.0)
    sizes, suffix_first = [], 0
    for document in range(n):
        body = source.read(*source.bounds(document)).tolist()
        suffix, middle = body.index(MARKS.suffix), body.index(MARKS.middle)
        sizes.append((suffix - 1, middle - suffix - 1, len(body) - middle - 2))
        suffix_first += suffix == 1
    # SPM has no text before the suffix; of PSM it is empty for about one in 16.
    assert suffix_first / n == pytest.approx(0.5 + 0.5 / 16, abs=0.03)
    psm = np.array([size for size in sizes if size[0]])
    np.testing.assert_allclose(psm.mean(0), [10.6, 9.7, 9.7], atol=0.6)


def test_epochs_turn_others_but_as_many():
    sources = [turned([5] * 100, rate=0.3, key=key) for key in range(3)]
    chosen = [{i for i in range(100) if len(s.parts(i)) > 1} for s in sources]
    assert [len(one) for one in chosen] == [30, 30, 30]
    assert chosen[0] != chosen[1] != chosen[2]
    assert {s.tokens for s in sources} == {1 + 600 + 90}
    for one in chosen:  # in each stratum too
        counts = [len({i for i in one if i // STRATUM == k}) for k in range(6)]
        assert all(4 <= count <= 5 for count in counts)


def test_the_bytes_are_those_of_the_first_version():
    """Documents of 0 to 499 tokens; checkpoints and inspect rely on them."""
    source = turned([(n * 7919) % 500 for n in range(300)], rate=0.4, spm=0.25, key=11)
    whole = source.read(0, source.tokens)
    assert hashlib.sha256(whole.astype("<i4").tobytes()).hexdigest() == FIRST_VERSION
    bounds = [source.bounds(document) for document in range(source.documents)]
    assert [whole[a:b].tolist() for a, b in bounds] == [source.read(*b).tolist() for b in bounds]


def test_a_place_is_found_in_a_few_looks(monkeypatch: pytest.MonkeyPatch):
    """Of 50,000 documents; halving the strata took 12. Their tables are made once."""
    source = turned([(n * 7919) % 1000 for n in range(50_000)], rate=0.5)
    places = range(1, source.tokens, 99_991)
    expected = [source.find(token) for token in places]
    looks = []
    for name in ("find", "bounds"):
        real = getattr(StoredSource, name)
        counted = lambda self, at, real=real: looks.append(at) or real(self, at)  # noqa: E731
        monkeypatch.setattr(StoredSource, name, counted)
    assert [source.find(token) for token in places] == expected
    assert len(looks) <= 4 * len(places)


def test_a_read_outside_of_it_is_refused():
    with pytest.raises(IndexError, match="toy: 0..99 of"):
        turned([3]).read(0, 99)


def test_a_tokenizer_without_sentinels_is_a_users_error():
    with pytest.raises(UserError, match="has no fim_middle; take another tokenizer"):
        sentinels({"eot": 0, "fim_prefix": 1}, "code")
