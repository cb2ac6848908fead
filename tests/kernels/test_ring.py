"""Attention of a sequence that is spread over `context`: the plain softmax attention, by both ways,
from devices that never hold more than their ring's neighbours' keys."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SCALE, draw, features_equal_the_plain_einsum, packed
from jax.sharding import PartitionSpec as P
from meshes import hlo, on

from jaxmoe import context
from jaxmoe.context import collected, spread
from jaxmoe.kernels import online, ring
from jaxmoe.kernels.attention import context_attention

BLOCK = 8  # of the online softmax here, so that short sequences have several
HEADS = P(None, "context", "model", None)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "BLOCK", BLOCK)


def attention_on_shards(wish: str) -> Callable[..., Any]:
    """`causal_attention` of whole sequences in natural order, on the mesh of the trace."""

    def attend(q: Any, k: Any, v: Any, documents: Any = None, sinks: Any = None, **options: Any):
        one_head = P(None, "context", None, None)
        of_keys = HEADS if k.shape[2] > 1 else one_head
        mapped = jax.shard_map(
            partial(context_attention, wish=wish, **options),
            in_specs=(HEADS, of_keys, of_keys, P(None, "context"), P("model")),
            out_specs=HEADS,
        )
        q, k, v = (spread(jnp.asarray(a)) for a in (q, k, v))
        q = jax.reshard(q, HEADS)
        k, v = (jax.reshard(a, of_keys) for a in (k, v))
        documents = None if documents is None else spread(jnp.asarray(documents))
        sinks = None if sinks is None else jax.reshard(sinks, P("model"))
        return jax.reshard(collected(mapped(q, k, v, documents, sinks)), P())

    return attend


EVERYTHING = {"soft_cap": 2.0, "documents": True, "sinks": True}
# (mesh, length, options, shape): blocks of half a shard, of several and of an odd number of
# positions; windows within a block, of the neighbours, of several shards and of all; documents and
# sinks and soft caps; multi-head, grouped and multi-query; U != H.
CASES: dict[str, tuple[dict[str, int], int, dict[str, Any], dict[str, int]]] = {
    "two shards": ({"context": 2}, 4 * BLOCK, {}, {}),
    "one position a block": ({"context": 4}, 8, {}, {"n": 2, "k": 1}),
    "odd blocks": ({"context": 3}, 6 * 15, EVERYTHING, {"n": 4, "k": 4, "u": 6}),
    "several blocks, and heads": ({"context": 4, "model": 2}, 16 * BLOCK, EVERYTHING, {"n": 4}),
    "multi-query": ({"context": 2, "model": 2}, 4 * BLOCK, EVERYTHING, {"n": 4, "k": 1}),
    "window 1": ({"context": 8}, 16, {"window": 1}, {}),
    "neighbours": ({"context": 8}, 32, {"window": 3, **EVERYTHING}, {"n": 2, "k": 1}),
    "neighbours' neighbours": ({"context": 8}, 32, {"window": 5}, {"n": 2, "k": 1, "u": 14}),
    "window of many": ({"context": 4}, 64, {"window": 30, "documents": True}, {}),
}


GATHERED = ("odd blocks", "several blocks, and heads", "multi-query", "window of many")
WAYS = [*((name, "ring") for name in CASES), *((name, "gather") for name in GATHERED)]


@pytest.mark.parametrize(("name", "wish"), WAYS)
def test_equals_the_plain_einsum(name: str, wish: str) -> None:
    """Values, and gradients of queries, keys, values and sinks."""
    axes, length, options, shape = CASES[name]
    with jax.set_mesh(on(**axes)):
        attend = attention_on_shards(wish)
        features_equal_the_plain_einsum(attend, length, options, {"batch": 2, **shape})


@pytest.mark.parametrize("c", [1, 2, 3, 8])
def test_zigzag(c: int) -> None:
    """Shard i has the blocks i and 2 c - 1 - i, as many pairs that see each other as any other
    shard, and the way back is one."""
    half = 3
    whole = np.arange(2 * c * half)
    shards = np.split(np.asarray(context.zigzag(jnp.asarray(whole), 0, c)), c)
    seen = []
    for i, mine in enumerate(shards):
        starts = context.block_starts(i, c, half)
        np.testing.assert_array_equal(mine, [s + n for s in starts for n in range(half)])
        seen.append((mine + 1).sum())
    assert len(set(seen)) == 1
    back = context.straight(jnp.asarray(np.concatenate(shards)), 0, c)
    np.testing.assert_array_equal(back, whole)
    with jax.set_mesh(on(data=1, context=c)):
        rows = np.arange(4 * len(whole)).reshape(2, len(whole), 2)
        there = jax.jit(spread)(rows)
        assert there.addressable_shards[0].data.shape == (2, 2 * half, 2)
        np.testing.assert_array_equal(jax.jit(collected)(there), rows)


def seen_by(shard: int, c: int, half: int, window: int | None) -> set[int]:
    """Shards with a key that some query of this one sees, by trying all."""
    holder = np.asarray(context.zigzag(jnp.arange(2 * c * half), 0, c)).reshape(c, 2 * half)
    mine = holder[shard]
    others = set()
    for other in range(c):
        apart = mine[:, None] - holder[other][None, :]
        visible = apart >= 0 if window is None else (apart >= 0) & (apart < window)
        if visible.any():
            others.add(other)
    return others


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 7, 8, 10, 11, 99])
def test_a_ring_visits_those_that_are_seen(window: int | None) -> None:
    """Every one, and none that no shard sees."""
    c, half = 8, 3
    visits = {back % c for back in ring._visits(window, 2 * half, c)}
    needed = {
        (shard - other) % c for shard in range(c) for other in seen_by(shard, c, half, window)
    }
    assert visits == needed


def program(wish: str, length: int, axes: dict[str, int], **options: Any) -> Any:
    """Compiled gradients on a mesh, of arrays that are spread already."""
    q, k, v, _ = jax.eval_shape(partial(draw, length, batch=1, n=4, k=2))
    mesh = on(**axes)

    def shaped(a: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

    def loss(q: Any, k: Any, v: Any) -> jax.Array:
        f = partial(context_attention, wish=wish, scale=SCALE, **options)
        return jax.shard_map(f, in_specs=(HEADS,) * 3, out_specs=HEADS)(q, k, v).sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return step.lower(*(shaped(a, HEADS) for a in (q, k, v))).compile()


def test_a_rings_memory_falls_with_the_shards_and_gathering_holds_all_keys() -> None:
    length = 4096
    rings = [
        program("ring", length, {"context": c}).memory_analysis().temp_size_in_bytes
        for c in (2, 4, 8)
    ]
    assert rings[1] < 0.6 * rings[0] and rings[2] < 0.6 * rings[1], rings
    gathered = program("gather", length, {"context": 8}).memory_analysis().temp_size_in_bytes
    assert gathered > 2 * rings[2], (gathered, rings)


def test_what_moves() -> None:
    """A ring passes keys on and gathers nothing; one of neighbours is two hops long; gathering
    passes nothing on."""
    all_of = {"context": 8}
    whole, gathered = (hlo(program(wish, 128, all_of)) for wish in ("ring", "gather"))
    assert "collective-permute" in whole and "all-gather" not in whole
    assert "all-gather" in gathered and "collective-permute" not in gathered
    trips = [_trips(hlo(program("ring", 128, all_of, window=w))) for w in (None, 3)]
    assert trips[0] == 7 and trips[1] == 2, trips


def _trips(text: str) -> int:
    """Of the loops that pass keys on."""
    counts = [
        int(match[1])
        for match in re.finditer(r'known_trip_count":\{"n":"(\d+)"', text)
        if "collective-permute" in _body_of(text, match.start())
    ]
    assert counts and len(set(counts)) == 1, counts
    return counts[0]


def _body_of(text: str, at: int) -> str:
    """The computation that the while instruction on this line runs."""
    line = text[text.rindex("\n", 0, at) : at]
    name = re.search(r"body=(%?[\w.\-]+)", line)
    assert name is not None, line
    begin = re.search(rf"^{re.escape(name[1])} ", text, re.M)
    assert begin is not None
    return text[begin.start() : text.index("\n}", begin.start())]


def test_the_way_by_cost() -> None:
    few, many = ring.FEW_BYTES, ring.FEW_BYTES + 1
    for want, options in {
        "gather": {"heads": (16, 8), "bytes_": few},
        "ring": {"heads": (16, 8), "bytes_": many},
    }.items():
        assert ring.pick("auto", 4, None, length=64, **options) == want
    # The keys of all shards are no more than the queries of one.
    assert ring.pick("auto", 4, None, length=64, heads=(16, 4), bytes_=many) == "gather"
    assert ring.pick("auto", 4, 33, length=64, heads=(16, 1), bytes_=few) == "ring"
    assert ring.pick("auto", 4, 34, length=64, heads=(16, 1), bytes_=few) == "gather"
    for wish in ("ring", "gather"):
        assert ring.pick(wish, 4, 33, length=64, heads=(16, 16), bytes_=many) == wish


def test_blocks_divide_and_are_not_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "BLOCK", 256)
    want = {1: 1, 7: 7, 256: 256, 512: 256, 300: 150, 257: 257, 2 * 257: 257, 3 * 521: 521}
    assert {length: ring._block(length) for length in want} == want


def test_documents_of_other_shards_are_told_apart() -> None:
    """With equal scores a position gives the mean of the values of its document so far, wherever
    the document began."""
    length = 32
    _, _, v, _ = draw(length, batch=2, n=2, k=1)
    documents = packed(2, length)
    with jax.set_mesh(on(context=4)):
        zeros = np.zeros((2, length, 2, v.shape[-1]), np.float32)
        attend = jax.jit(partial(attention_on_shards("ring"), scale=1.0))
        o = np.asarray(attend(zeros, zeros[:, :, :1], v, documents))
    for row in range(2):
        for i in range(length):
            mine = documents[row, : i + 1] == documents[row, i]
            want = np.asarray(v)[row, : i + 1][mine].mean(0)
            np.testing.assert_allclose(o[row, i], np.repeat(want, 2, 0), rtol=1e-5, atol=1e-6)
