"""Sequences out of documents: whole where they fit, nothing padded, nothing lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import numbered

from jaxmoe.data.packing import ROWS, Packer, pack


def pieces_of(lengths: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *lengths]).tolist()
    return list(zip(ends, ends[1:], strict=False))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), length=st.integers(1, 25))
@settings(max_examples=200, deadline=None)
def test_all_sequences_are_full_and_each_token_is_in_one(lengths: list[int], length: int):
    lengths = [*lengths, (-sum(lengths)) % length or length]
    pieces = pieces_of(lengths)
    rows = pack(pieces, length)
    assert all(sum(stop - start for start, stop in row) == length for row in rows)
    seen = Counter(t for row in rows for start, stop in row for t in range(start, stop))
    assert seen == Counter(range(sum(lengths)))
    # Never two documents in one part, and no empty part.
    borders = {start for start, _ in pieces}
    for row in rows:
        for start, stop in row:
            assert start < stop and not borders & set(range(start + 1, stop))


def test_what_fits_is_not_cut():
    """Best fit, decreasing, by hand: 7 + 3, 6 + 4, 5 + 5; first fit in order would cut two."""
    rows = pack(pieces_of([3, 5, 4, 6, 5, 7]), 10)
    assert sorted(sorted(stop - start for start, stop in row) for row in rows) == [
        *([3, 7], [4, 6], [5, 5])
    ]
    # A long one fills whole sequences first; what is left of it is packed like any other.
    long = pack(pieces_of([24, 6]), 10)
    assert [[stop - start for start, stop in row] for row in long] == [[10], [10], [6, 4]]
    # 6 + 6 + 8 in two sequences of 10: the last to come is cut over both gaps.
    forced = pack(pieces_of([6, 6, 8]), 10)
    assert sorted(len(row) for row in forced) == [2, 2]


def cut_documents(packer: Packer, ends: np.ndarray, length: int) -> float:
    """Share of the documents that lie in more than one sequence."""
    parts: Counter[int] = Counter()
    for at in range(0, packer.epoch, length):
        for _, start, stop in packer.spans(at, length):
            parts.update(
                range(
                    np.searchsorted(ends, start, "right"),
                    1 + np.searchsorted(ends, stop - 1, "right"),
                )
            )
    return sum(n > 1 for n in parts.values()) / len(parts)


def test_best_fit_cuts_few_of_the_documents_that_split_cuts():
    """Lengths of half to a tenth of a sequence: a third of them are cut where sequences end."""
    lengths = np.random.default_rng(0).integers(8, 40, 3000).tolist()
    source = numbered("toy", lengths)
    ends = 1 + np.cumsum([n + 1 for n in lengths])
    shares = {
        kind: cut_documents(Packer(lambda _: source, [64], kind, 0), ends, 64)
        for kind in ("split", "best_fit")
    }
    assert shares["split"] > 0.35
    assert shares["best_fit"] < 0.05


@given(
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=20),
    unit=st.integers(1, 6),
    kind=st.sampled_from(["split", "best_fit"]),
    steps=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 9)), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_the_row_is_read_on_through_changes_of_length(
    lengths: list[int], unit: int, kind: str, steps: list[tuple[int, int]]
):
    """In one epoch no token twice, in a full one none left out, whatever lengths follow."""
    source = numbered("toy", [*lengths, 8 * unit])
    assert kind in ("split", "best_fit")
    packer = Packer(lambda _: source, [unit, 2 * unit, 4 * unit], kind, 5)
    assert 0 <= source.tokens - 1 - packer.epoch < 4 * unit
    seen: Counter[tuple[int, int]] = Counter()
    at = skipped = before = 0
    for factor, n in steps:
        start = at if factor == before else packer.next_start(at)
        skipped, at, before = skipped + start - at, start, factor
        for _ in range(n):
            for epoch, first, last in packer.spans(at, factor * unit):
                seen.update((epoch, token) for token in range(first, last))
            at += factor * unit
    assert not seen or max(seen.values()) == 1
    assert sum(seen.values()) == at - skipped
    assert kind == "best_fit" or not skipped
    assert skipped <= 6 * max(4 * unit, packer.epoch // 64 + 4 * unit)


def test_epochs_differ_and_windows_are_shuffled():
    source = numbered("toy", [9] * 2000)
    packer = Packer(lambda _: source, [16], "split", 3)
    firsts = [
        [packer.spans(epoch * packer.epoch + at, 16)[0].start for at in range(0, packer.epoch, 16)]
        for epoch in (0, 1, 2)
    ]
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(0, packer.epoch, 16))
    assert len({tuple(first) for first in firsts}) == 3
    assert abs(np.corrcoef(firsts[0], sorted(firsts[0]))[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["split", "best_fit"])
def test_a_source_shorter_than_a_window_is_read_too(kind: str):
    assert kind in ("split", "best_fit")
    packer = Packer(lambda _: numbered("toy", [5, 30, 5]), [8], kind, 0)
    assert packer.epoch == 40 < 8 * ROWS
    found = Counter(
        t for at in range(0, 80, 8) for e, a, b in packer.spans(at, 8) for t in range(a, b)
    )
    assert found == {t: 2 for t in range(40)}
