"""How rows travel to the devices of the `expert` axis that hold their experts, and back.

Each way gives the same: a buffer of rows on every device in which each expert's rows are segments
[e, g], one of each sending shard g, rising over (e, g). Buffers have a static size: where it does
not suffice for the loads at hand (`needed`, `sizes`), they are filled several times.

    local         one expert shard: rows are sorted, nothing travels
    all_to_all    each shard sends C slots to each expert
    all_gather    every row goes to every shard, which takes those that it needs; sums are
                  scattered back ("ring of experts")
    ragged        each shard sends what there is: exact, where the backend has the collective

Each shard of `model` has a part of every expert's F, so all of them need all rows of their experts.
Where rows are `spread` over `model`, each sends its own over `expert`, and they are brought
together behind it, over the nearest links; sums go back the other way. Else all send the same.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.kernels.dispatch import (
    Order,
    from_experts,
    inverse,
    parted,
    slot_plan,
    starts,
    sum_of_slots,
    take,
    to_experts,
    together,
)
from jaxmoe.mesh import platform, stream_is_spread, vary_alike, varying

Array = jax.Array
AXIS = "expert"

# Sizes of buffers relative to a balanced load. The most loaded expert of a layer had 1.30 times its
# share in the median and 1.55 at the 95th percentile (quickstart, learned router; LOG.md
# 2026-11-22). Each size costs compile time.
CAPACITY_FACTORS = (1.25, 1.5, 2.0)


class Exchange(Protocol):
    """One shard's view, inside of shard_map. S: rows of the buffer on this device."""

    starts_eg: Array  # int32
    lengths_eg: Array  # int32

    def rows(self, x_tD: Array) -> Array:
        """x_SD: every row that this device's experts get."""
        ...

    def pack(self, a: Array) -> Array:
        """Rows of the buffer with the segments one behind the other; and what is zero behind."""
        ...

    def unpack(self, a: Array) -> Array:
        """The way back; rows of no segment are zero."""
        ...

    def weights(self, weights_tA: Array) -> Array:
        """weights_S: the combine weight of each row."""
        ...

    def sum_back(self, y_SD: Array) -> Array:
        """y_tD: the sum of each token's rows, added in float32; the transpose of `rows`. Also over
        `model` where rows are spread over it; else that is left to do (dispatch.completed)."""
        ...

    def weights_back(self, dweights_S: Array) -> Array:
        """dweights_tA: the transpose of `weights`."""
        ...


def sends_own_rows(length: int, sizes: Mapping[str, int]) -> bool:
    """Whether each shard of `model` sends its own part of the rows, or all the same: wherever they
    travel and can be spread. Over `expert` go 1 / m of the rows then, and over `model`, of nearer
    links, more: in sum over both at most one row a token and layer, where the way is the
    `cheapest`.

    Args:
        length: of a sequence.
        sizes: of the mesh's axes.
    """
    return sizes[AXIS] > 1 and stream_is_spread(length, sizes)


def is_spread(rows: Array) -> bool:
    """Whether the rows of the shards of `model` are different ones, inside of shard_map."""
    return "model" in varying(rows)


def cheapest(tokens: int, shards: int, n_experts: int, top_k: int) -> str:
    """The way that moves fewer rows over the axis. `ragged` moves the fewest, but has to be asked
    for: it was timed on no backend, and CPU lacks it."""
    if shards == 1:
        return "local"
    slots = sizes("all_to_all", tokens, shards, n_experts, top_k)[0]
    all_to_all = (shards - 1) / shards * n_experts * slots
    all_gather = (shards - 1) * tokens
    return "all_gather" if all_gather < all_to_all else "all_to_all"


def sizes(kind: str, tokens: int, shards: int, n_experts: int, top_k: int) -> list[int]:
    """Compiled sizes, rising: slots of an expert or rows of the buffer; none larger than `most`.

    Args:
        tokens: that a device sends; with all_gather those of all shards of `model`, which fill one
            buffer.
    """
    if kind == "local":
        return [tokens * top_k]
    mean = tokens * top_k / (n_experts if kind == "all_to_all" else 1)
    largest = most(kind, tokens, shards, n_experts, top_k)
    return sorted({min(largest, _round_up(math.ceil(f * mean), 8)) for f in CAPACITY_FACTORS})


def most(kind: str, tokens: int, shards: int, n_experts: int, top_k: int) -> int:
    """The size that always suffices, as a token's choices are different experts."""
    if kind == "local":
        return tokens * top_k
    if kind == "all_to_all":
        return tokens
    return tokens * shards * min(top_k, n_experts // shards)


def needed(kind: str, order: Order) -> Array:
    """int32: the size that suffices for this device's part in the exchange."""
    if kind == "all_to_all":
        return order.load_E.max()
    over = (AXIS, "model") if kind == "all_gather" and is_spread(order.load_E) else AXIS
    return jax.lax.psum(order.load_E, over).reshape(jax.lax.axis_size(AXIS), -1).sum(1).max()


def open_exchange(
    kind: str, order: Order, ids_tA: Array, size: int, first: Array | None = None
) -> Exchange:
    """`first`: the slot or row that the buffer begins with, where it is filled several times;
    None: it suffices."""
    if kind == "local":
        return _Local(order)
    if kind == "all_to_all":
        return _AllToAll(order, ids_tA, size, jnp.int32(0) if first is None else first)
    if kind == "all_gather":
        return _AllGather(order, size, jnp.int32(0) if first is None else first)
    if first is None:
        return _Ragged(order, size)
    # Rounds would make the sizes that are sent uneven.
    ways = jax.lax.axis_size("model") if is_spread(order.load_E) else 1
    return _AllGather(order, ways * size, ways * first)


class _Packed:
    """A buffer that has no gaps to begin with."""

    def pack(self, a: Array) -> Array:
        return a

    def unpack(self, a: Array) -> Array:
        return a


class _Local(_Packed):
    def __init__(self, order: Order) -> None:
        assert not is_spread(order.load_E)
        self._order = order
        self.lengths_eg = order.load_E[:, None]
        self.starts_eg = starts(self.lengths_eg)

    def rows(self, x_tD: Array) -> Array:
        return take(x_tD, self._order.token_S)

    def weights(self, weights_tA: Array) -> Array:
        return take(weights_tA.reshape(-1), self._order.choice_S)

    def sum_back(self, y_SD: Array) -> Array:
        return sum_of_slots(y_SD, self._order.place_tA)

    def weights_back(self, dweights_S: Array) -> Array:
        return take(dweights_S, self._order.place_tA)


class _AllToAll:
    """Slots of an expert: C from each shard, the first ones filled."""

    def __init__(self, order: Order, ids_tA: Array, capacity: int, first: Array) -> None:
        self._capacity, self._spread = capacity, is_spread(order.load_E)
        self._plan = slot_plan(order, ids_tA, capacity, first)
        filled_E = jnp.clip(order.load_E - first, 0, capacity)
        lengths_ge = filled_E.reshape(jax.lax.axis_size(AXIS), -1)
        lengths_ge = jax.lax.all_to_all(lengths_ge, AXIS, split_axis=0, concat_axis=0)
        self.lengths_eg = _of_all(lengths_ge.T, self._spread)
        begins = jnp.arange(self.lengths_eg.size, dtype=jnp.int32) * capacity
        self.starts_eg = begins.reshape(self.lengths_eg.shape)

    def rows(self, x_tD: Array) -> Array:
        return self._there(take(x_tD, self._plan.token_S))

    def weights(self, weights_tA: Array) -> Array:
        return self._there(take(weights_tA.reshape(-1), self._plan.choice_S))

    def sum_back(self, y_SD: Array) -> Array:
        return sum_of_slots(self._back(y_SD), self._plan.slot_tA)

    def weights_back(self, dweights_S: Array) -> Array:
        return take(self._back(dweights_S), self._plan.slot_tA)

    def pack(self, a: Array) -> Array:
        return take(a, packed_places(self.starts_eg, self.lengths_eg, len(a)))

    def unpack(self, a: Array) -> Array:
        # Slots are in order, so a row's place is the filled slots before it.
        slots_1C = jnp.arange(self._capacity, dtype=jnp.int32)[None]
        filled_n1 = self.lengths_eg.reshape(-1, 1)
        places = starts(filled_n1) + slots_1C
        return take(a, jnp.where(slots_1C < filled_n1, places, len(a)).reshape(-1))

    def _there(self, a: Array) -> Array:
        return to_experts(a, self._capacity, self._spread).reshape(-1, *a.shape[1:])

    def _back(self, a: Array) -> Array:
        e = len(self.starts_eg)
        return from_experts(a.reshape(e, -1, *a.shape[1:]), self._capacity, self._spread)


class _AllGather(_Packed):
    """The buffer has the rows of this device's experts alone, without gaps. Rows that are spread
    over `model` are brought together before they are copied to where their experts want them."""

    def __init__(self, order: Order, size: int, first: Array) -> None:
        t, a = order.place_tA.shape
        self._spread = is_spread(order.load_E)
        load_gE = self._gathered(order.load_E[None])
        starts_ge = _mine(jnp.cumsum(load_gE, axis=1) - load_gE)
        shards = len(load_gE)
        # Where in the orders of all shards, one behind the other.
        first_g1 = jnp.arange(shards, dtype=jnp.int32)[:, None] * (t * a)
        all_eg = _mine(load_gE).T
        place_S = packed_places((first_g1 + starts_ge).T, all_eg, size, first)
        starts_eg = starts(all_eg) - first
        self.starts_eg = jnp.clip(starts_eg, 0, size)
        self.lengths_eg = jnp.clip(starts_eg + all_eg, 0, size) - self.starts_eg
        choice_n = self._gathered(order.choice_S[None])
        choice_n = (choice_n + first_g1).reshape(-1)  # of all shards' tokens
        self._choice_S = take(choice_n, place_S, fill=shards * t * a)
        self._a = a
        self._slot_nA = inverse(self._choice_S, shards * t * a).reshape(-1, a)

    def rows(self, x_tD: Array) -> Array:
        return take(self._gathered(x_tD), self._choice_S // self._a)

    def weights(self, weights_tA: Array) -> Array:
        return take(self._gathered(weights_tA).reshape(-1), self._choice_S)

    def sum_back(self, y_SD: Array) -> Array:
        return self._scattered(sum_of_slots(y_SD, self._slot_nA))

    def weights_back(self, dweights_S: Array) -> Array:
        return self._scattered(take(dweights_S, self._slot_nA))

    def _gathered(self, a: Array) -> Array:
        a = jax.lax.all_gather(a, AXIS, tiled=True)
        return jax.lax.all_gather(a, "model", tiled=True) if self._spread else a

    def _scattered(self, a: Array) -> Array:
        return jax.lax.psum_scatter(parted(a, self._spread), AXIS, tiled=True)


class _Ragged(_Packed):
    """Rows arrive by sender, and are put in the order of the experts; sent without gaps."""

    def __init__(self, order: Order, size: int) -> None:
        self._order, self._size, self._spread = order, size, is_spread(order.load_E)
        load_gE = jax.lax.all_gather(order.load_E, AXIS)  # g: sender
        shards = len(load_gE)
        me = jax.lax.axis_index(AXIS)
        sent_gh = load_gE.reshape(shards, shards, -1).sum(-1)  # rows from g to h
        before_gh = jnp.cumsum(sent_gh, axis=0) - sent_gh  # of other senders, on the receiver
        within_gh = jnp.cumsum(sent_gh, axis=1) - sent_gh  # in the sender's order
        # Offsets and sizes of ragged_all_to_all, there and back.
        self._there = (within_gh[me], sent_gh[me], before_gh[me], sent_gh[:, me])
        self._back = (before_gh[:, me], sent_gh[:, me], within_gh[:, me], sent_gh[me])
        load_ge = _mine(load_gE)
        arrived_ge = before_gh[:, me, None] + jnp.cumsum(load_ge, axis=1) - load_ge
        if self._spread:
            arrived_ge += jax.lax.axis_index("model") * size
        self.lengths_eg = _of_all(load_ge.T, self._spread)
        self.starts_eg = starts(self.lengths_eg)
        rows = size * jax.lax.axis_size("model") if self._spread else size
        arrived = _of_all(arrived_ge.T, self._spread)
        self._place_S = packed_places(arrived, self.lengths_eg, rows)
        self._slot_S = inverse(self._place_S, rows)

    def rows(self, x_tD: Array) -> Array:
        return self._send(take(x_tD, self._order.token_S))

    def weights(self, weights_tA: Array) -> Array:
        return self._send(take(weights_tA.reshape(-1), self._order.choice_S))

    def sum_back(self, y_SD: Array) -> Array:
        return sum_of_slots(self._return(y_SD), self._order.place_tA)

    def weights_back(self, dweights_S: Array) -> Array:
        return take(self._return(dweights_S), self._order.place_tA)

    def _send(self, a: Array) -> Array:
        arrived = together(_ragged_all_to_all(a, self._size, self._there), self._spread)
        return take(arrived, self._place_S)

    def _return(self, a: Array) -> Array:
        n = self._order.place_tA.size
        return _ragged_all_to_all(parted(take(a, self._slot_S), self._spread), n, self._back)


def packed_places(starts_eg: Array, lengths_eg: Array, size: int, first: Array | int = 0) -> Array:
    """int32 [size]: the sources of the rows first, first + 1, ... of a buffer in which segments lie
    one behind the other; beyond them a number too large for any source."""
    lengths = lengths_eg.reshape(-1)
    ends = jnp.cumsum(lengths)
    at_S = first + jnp.arange(size, dtype=jnp.int32)
    segment_S = jnp.searchsorted(ends, at_S, side="right").astype(jnp.int32)
    shift = starts_eg.reshape(-1) - (ends - lengths)
    return jnp.where(at_S < ends[-1], at_S + take(shift, segment_S), jnp.iinfo(jnp.int32).max)


def _of_all(a_eg: Array, spread: bool) -> Array:
    """Of all senders, where those of the other shards of `model` count too."""
    return jax.lax.all_gather(a_eg, "model", axis=1, tiled=True) if spread else a_eg


def _mine(a_gE: Array) -> Array:
    """The columns of this device's experts."""
    e = a_gE.shape[1] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(a_gE, jax.lax.axis_index(AXIS) * e, e, axis=1)


def _ragged_all_to_all(a: Array, size: int, moves: tuple[Any, ...]) -> Array:
    """`moves`: input offsets, sizes sent, offsets on the receivers, sizes received; by peer."""
    if platform() == "cpu":
        return _ragged_by_gathering(a, size, moves)
    output, _ = vary_alike(jnp.zeros((size, *a.shape[1:]), a.dtype), a)
    return jax.lax.ragged_all_to_all(a, output, *moves, axis_name=AXIS)


def _ragged_by_gathering(a: Array, size: int, moves: tuple[Any, ...]) -> Array:
    """The same on XLA CPU, which lacks the collective (jax 0.10 to 0.12): for tests."""
    me = jax.lax.axis_index(AXIS)
    whole = jax.lax.all_gather(a, AXIS)
    inputs_gh, sent_gh, outputs_gh, _ = (jax.lax.all_gather(move, AXIS) for move in moves)
    at_S = jnp.arange(size, dtype=jnp.int32)
    result = jnp.zeros_like(a, shape=(size, *a.shape[1:]))
    for g in range(len(whole)):
        within_S = at_S - outputs_gh[g, me]
        here_S = (within_S >= 0) & (within_S < sent_gh[g, me])
        rows = take(whole[g], jnp.where(here_S, within_S + inputs_gh[g, me], len(a)))
        result += rows
    return result


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
