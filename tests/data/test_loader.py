import builtins
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data.loader import Stream, documents, heldout_batches
from jaxmoe.errors import UserError

_TOKENS = np.arange(1000, dtype=np.uint16)  # each token says where it was


@given(
    length=st.integers(2, 300),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_target_of_an_epoch_is_seen_exactly_once(
    length: int, seq_len: int, seed: int, epoch: int
):
    if length <= seq_len:
        return
    stream = Stream(_TOKENS[:length], seq_len, seed)
    assert len(stream) == (length - 1) // seq_len
    samples = stream.rows(epoch * len(stream), 0, len(stream))
    assert samples.dtype == np.int32
    assert samples.shape == (len(stream), seq_len + 1)
    assert (np.diff(samples, axis=1) == 1).all()
    assert sorted(samples[:, 1:].ravel()) == list(range(1, len(stream) * seq_len + 1))


def test_order_is_a_pure_function_of_seed_and_position():
    first = [Stream(_TOKENS, 10, 5)[i] for i in range(300)]
    stream = Stream(_TOKENS, 10, 5)
    for i in np.random.default_rng(0).permutation(300):
        assert (stream[int(i)] == first[i]).all()
    assert (stream[10**12] == Stream(_TOKENS, 10, 5)[10**12]).all()


def test_rows_do_not_depend_on_how_hosts_split_them():
    stream = Stream(_TOKENS, 10, 5)
    for position in (0, 96, 1234):
        whole = stream.rows(position, 0, 24)
        for hosts in (1, 2, 3, 4, 8):
            each = 24 // hosts
            parts = [stream.rows(position, h * each, (h + 1) * each) for h in range(hosts)]
            assert (np.concatenate(parts) == whole).all()
    joined = np.concatenate([stream.rows(0, 0, 8), stream.rows(8, 0, 8), stream.rows(16, 0, 8)])
    assert (joined == stream.rows(0, 0, 24)).all()


def test_epochs_and_seeds_differ_in_order():
    streams = [Stream(_TOKENS, 10, seed) for seed in range(4)]
    n = len(streams[0])
    orders = [tuple(s.rows(e * n, 0, n)[:, 0]) for s in streams for e in range(4)]
    assert len(set(orders)) == len(orders)
    assert all(order != tuple(sorted(order)) for order in orders)
    fixed = Counter(a == b for order in orders for a, b in zip(order, sorted(order), strict=True))
    assert fixed[True] < 0.05 * fixed[False]


def test_epoch_counts_whole_readings():
    stream = Stream(_TOKENS[:101], 10, 0)
    assert [stream.epoch(p) for p in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_positions_before_the_start_are_refused():
    with pytest.raises(IndexError, match="-1"):
        Stream(_TOKENS, 10, 0)[-1]


def test_tokens_of_a_file_are_read_in_place(tmp_path: Any):
    (tmp_path / "x.bin").write_bytes(_TOKENS.astype("<u2").tobytes())
    mapped = np.memmap(tmp_path / "x.bin", "<u2", mode="r")
    rows = Stream(mapped, 10, 3).rows(7, 2, 9)
    assert type(rows) is np.ndarray
    assert (rows == Stream(_TOKENS, 10, 3).rows(7, 2, 9)).all()


def test_too_few_tokens_is_a_users_error_with_the_numbers():
    Stream(_TOKENS[:11], 10, 0)
    with pytest.raises(UserError, match="train.seq_len=10 needs 11 tokens.* has 10"):
        Stream(_TOKENS[:10], 10, 0)
    with pytest.raises(UserError, match="has 1 tokens"):
        heldout_batches(_TOKENS[:1], 10, 2)


def test_without_grain_the_error_says_how_to_get_it(monkeypatch: Any):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "grain":
            raise ImportError("No module named 'grain'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="pip install grain"):
        Stream(_TOKENS, 10, 0)


@given(length=st.integers(2, 400), seq_len=st.integers(1, 30), batch=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_held_out_tokens_are_each_a_target_once(length: int, seq_len: int, batch: int):
    tokens = _TOKENS[:length]
    batches = heldout_batches(tokens, seq_len, batch)
    targets = []
    for inputs, weights in batches:
        assert inputs.shape == (batch, seq_len + 1)
        assert weights.shape == (batch, seq_len)
        assert (inputs.dtype, weights.dtype) == (np.int32, np.float32)
        assert set(weights.ravel()) <= {0.0, 1.0}
        counted = weights == 1
        targets += inputs[:, 1:][counted].tolist()
        assert (inputs[:, :-1][counted] + 1 == inputs[:, 1:][counted]).all()
    assert targets == list(range(1, length))
    assert sum(w.sum() for _, w in batches[:-1]) == (len(batches) - 1) * batch * seq_len


@given(
    rows=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([0, 7, 7, 9]), min_size=n, max_size=n))
    ),
    cut=st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_an_eot_belongs_to_the_document_it_ends(rows: list[list[int]], cut: int):
    """Counted by hand; in each row from 1; the same however rows are split between processes."""
    if not rows:
        return

    def by_hand(row: list[int]) -> list[int]:
        return [1 + row[:i].count(7) for i in range(len(row))]

    found = documents(np.array(rows, np.int32), 7)
    assert found.dtype == np.int32
    assert found.tolist() == [by_hand(row) for row in rows]
    parts = [
        np.array(part, np.int32).reshape(-1, len(rows[0])) for part in (rows[:cut], rows[cut:])
    ]
    assert (np.concatenate([documents(part, 7) for part in parts]) == found).all()


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), seq_len=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_padding_is_no_document(lengths: list[int], seq_len: int):
    """Beyond the held-out text everything is filled with eot; the text's own documents stay."""
    text = [0, *(token for n in lengths for token in [*range(1, n + 1), 0])]
    left = len(text) - 1  # positions that predict something
    for tokens, weights in heldout_batches(np.array(text, np.uint16), seq_len, 4):
        found = documents(tokens[:, :-1], 0, weights)
        assert found.dtype == np.int32
        for row, numbers in zip(tokens[:, :-1].tolist(), found.tolist(), strict=True):
            real = max(0, min(left, seq_len))
            assert numbers[:real] == [1 + row[:i].count(0) for i in range(real)]
            assert numbers[real:] == [0] * (seq_len - real)
            left -= seq_len
