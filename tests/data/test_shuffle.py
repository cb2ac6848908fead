"""Orders that are computed: each index once, all orders alike, nothing kept."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from jaxmoe.data.shuffle import Permutation, hashed, make_key, ranks


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_each_index_comes_once(n: int, key: int):
    assert sorted(Permutation(n, key)(np.arange(n))) == list(range(n))
    assert sorted(ranks(n, key)) == list(range(n))


@given(n=st.integers(1, 10**15), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_value_is_that_of_the_whole(n: int, key: int, data: st.DataObject):
    order = Permutation(n, key)
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4, unique=True))
    values = order(np.array(index))
    assert [order.at(i) for i in index] == values.tolist()
    assert len(set(values.tolist())) == len(index) and ((0 <= values) & (values < n)).all()


@pytest.mark.parametrize("make", [lambda n, k: Permutation(n, k)(np.arange(n)), ranks])
def test_all_orders_of_four_things_are_as_likely(make: Any):
    """Chi-square over the 24 orders; 1 in 1000 honest shufflers would fail, of fixed keys none."""
    seen = Counter(tuple(make(4, key).tolist()) for key in range(2400))
    expected = 2400 / 24
    found = sum((seen[p] - expected) ** 2 / expected for p in itertools.permutations(range(4)))
    assert found < chi2.ppf(0.999, 23)


def test_neighbours_are_torn_apart():
    order = Permutation(20_000, 7)(np.arange(20_000))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


def test_the_order_never_changes():
    """By hand from the definition of splitmix64, so that no release of a library may move it."""

    def by_hand(value: int, key: int) -> int:
        mask = 2**64 - 1
        x = (value * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    values = [0, 1, 2**40, 2**62]
    assert hashed(np.array(values), 12345).tolist() == [by_hand(v, 12345) for v in values]
    assert make_key("a", 1) == 2076030777198362188
    assert Permutation(10, 3)(np.arange(10)).tolist() == [8, 3, 1, 4, 6, 0, 5, 2, 9, 7]


def test_keys_tell_their_parts_apart():
    keys = [make_key(*parts) for parts in (("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, ""))]
    assert len(set(keys)) == len(keys)
