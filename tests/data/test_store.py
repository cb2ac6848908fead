"""A source is one row of tokens, whatever shards it lies in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.data.store import StoredSource

EOT = 99


def source(lengths: list[int], cuts: list[int]) -> tuple[StoredSource, list[np.ndarray]]:
    documents = [np.arange(n, dtype=np.uint16) % 50 for n in lengths]
    row = np.concatenate([[EOT], *(np.append(d, EOT) for d in documents)]).astype(np.uint16)
    ends = 1 + np.cumsum([n + 1 for n in lengths])
    shards = np.split(row, sorted(c % len(row) for c in cuts))
    return StoredSource("toy", shards, ends), documents


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=12)
cuts = st.lists(st.integers(0, 1000), max_size=5)


@given(lengths, cuts)
def test_documents_come_back_from_any_shards(lengths: list[int], cuts: list[int]) -> None:
    toy, documents = source(lengths, cuts)
    assert toy.documents == len(lengths) and toy.tokens == 1 + sum(lengths) + len(lengths)
    for i, document in enumerate(documents):
        start, stop = toy.bounds(i)
        assert toy.read(start, stop).tolist() == [*document, EOT]
        assert {toy.find(t) for t in range(start, stop)} == {i}
    assert toy.find(0) == -1 and toy.read(0, 1).tolist() == [EOT]
    assert toy.read(0, toy.tokens).dtype == np.int32


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 100)])
def test_a_read_outside_of_a_source_is_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="toy"):
        source([3, 4], [2])[0].read(start, stop)


def test_a_document_outside_of_a_source_is_refused() -> None:
    for document in (-1, 2):
        with pytest.raises(IndexError, match="of 2"):
            source([3, 4], [])[0].bounds(document)
