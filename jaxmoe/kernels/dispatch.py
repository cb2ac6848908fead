"""Rows to experts and back, by gathers alone.

Everything here works on one shard: t tokens, each with A choices among E experts. An expert has C
slots for this shard's rows; the plan says which choice sits in which slot, and the two gathers are
each other's transpose, so neither direction ever scatters (scatters of rows are serial on CPU and
atomic on GPU).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Order:
    """Choices sorted by (expert, token, choice): made once, used forward and backward."""

    choice_S: Any  # int32, S = t * A: token * A + choice at each place
    place_tA: Any  # int32: the place of each choice
    load_E: Any  # int32: rows of each expert

    @property
    def token_S(self) -> Array:
        return self.choice_S // self.place_tA.shape[1]


@struct.dataclass
class Plan:
    """Which choice sits in which slot."""

    slot_tA: Array  # int32, expert * C + rank; E * C for a choice without a slot
    token_S: Array  # int32, S = E * C: the token in each slot; t for an empty slot
    choice_S: Array  # int32: token * A + choice in each slot; t * A for an empty slot


def make_order(ids_tA: Array, n_experts: int) -> Order:
    """ids_tA: int32 expert of each choice; the choices of one token are different experts."""
    t, a = ids_tA.shape
    n = t * a
    if n_experts * n < 1 << 31:
        # One key holds both: 0.8 ms against 2.9 ms of argsort (16,384 choices, 2 CPU cores).
        keys_S = jax.lax.sort(ids_tA.reshape(-1) * n + jnp.arange(n, dtype=jnp.int32))
        choice_S = keys_S % n
    else:
        choice_S = jnp.argsort(ids_tA.reshape(-1), stable=True).astype(jnp.int32)
    place_n = inverse(choice_S, n)
    load_E = expert_load(ids_tA, n_experts)
    return Order(choice_S=choice_S, place_tA=place_n.reshape(t, a), load_E=load_E)


def slot_plan(order: Order, ids_tA: Array, capacity: int, first: Array | int = 0) -> Plan:
    """C slots an expert, filled in order with its rows first .. first + C - 1; others have none."""
    n, n_experts = ids_tA.size, len(order.load_E)
    start_E = starts(order.load_E)
    rank_tA = order.place_tA - take(start_E, ids_tA) - first
    has_slot_tA = (rank_tA >= 0) & (rank_tA < capacity)
    slot_tA = jnp.where(has_slot_tA, ids_tA * capacity + rank_tA, n_experts * capacity)
    slots_C = first + jnp.arange(capacity, dtype=jnp.int32)
    choice_EC = take(order.choice_S, start_E[:, None] + slots_C[None])
    choice_S = jnp.where(slots_C[None] < order.load_E[:, None], choice_EC, n).reshape(-1)
    return Plan(slot_tA=slot_tA, token_S=choice_S // ids_tA.shape[1], choice_S=choice_S)


def starts(lengths: Array) -> Array:
    """Where each of these begins, of the same shape, where they lie one behind the other."""
    flat = lengths.reshape(-1)
    return (jnp.cumsum(flat) - flat).reshape(lengths.shape)


def inverse(places_S: Array, size: int) -> Array:
    """int32 [size]: the position in `places_S` of each number below `size`; S for those that are
    not in it."""
    n = len(places_S)
    positions_S = jnp.arange(n, dtype=jnp.int32)
    found = jnp.full(size, n, jnp.int32)
    return found.at[places_S].set(positions_S, mode="drop", unique_indices=True)


def expert_load(ids_tA: Array, n_experts: int) -> Array:
    """int32 [E]: the number of rows each expert gets."""
    return jax.nn.one_hot(ids_tA.reshape(-1), n_experts, dtype=jnp.int32).sum(0)


@jax.custom_vjp
def to_slots(x_tD: Array, plan: Plan) -> Array:
    """x_SD: each slot's token row; zeros in an empty slot."""
    return take(x_tD, plan.token_S)


def _to_slots_fwd(x_tD: Array, plan: Plan) -> tuple[Array, Plan]:
    return take(x_tD, plan.token_S), plan


def _to_slots_bwd(plan: Plan, dx_SD: Array) -> tuple[Array, None]:
    # In float32: a token's A gradients are added, whatever the compute dtype.
    return sum_of_slots(dx_SD, plan.slot_tA), None


to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@jax.custom_vjp
def from_slots(y_SD: Array, weights_tA: Array, plan: Plan) -> Array:
    """y_tD: each token's rows, weighted and added in float32, in the dtype of y."""
    return sum_of_slots(y_SD, plan.slot_tA, weights_tA)


def _from_slots_fwd(
    y_SD: Array, weights_tA: Array, plan: Plan
) -> tuple[Array, tuple[Array, Array, Plan]]:
    return sum_of_slots(y_SD, plan.slot_tA, weights_tA), (y_SD, weights_tA, plan)


def _from_slots_bwd(
    residuals: tuple[Array, Array, Plan], dy_tD: Array
) -> tuple[Array, Array, None]:
    y_SD, weights_tA, plan = residuals
    t, a = weights_tA.shape
    y_tAD = take(y_SD, plan.slot_tA).astype(jnp.float32)
    dweights_tA = (y_tAD * dy_tD[:, None, :].astype(jnp.float32)).sum(-1)
    # A slot's weight: its choice is the one of its token's A that points back at the slot.
    slots_SA = take(plan.slot_tA, plan.token_S, fill=-1)
    mine_SA = slots_SA == jnp.arange(y_SD.shape[0], dtype=jnp.int32)[:, None]
    weight_S = jnp.where(mine_SA, take(weights_tA, plan.token_S), 0).sum(-1)
    dy_SD = take(dy_tD, plan.token_S).astype(jnp.float32) * weight_S[:, None]
    return dy_SD.astype(y_SD.dtype), dweights_tA, None


from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


def sum_of_slots(y_SD: Array, slot_tA: Array, weights_tA: Array | None = None) -> Array:
    """y_tD: each token's rows, weighted or not, added in float32, in the dtype of y."""
    # A choice at a time, so that [t, A, D] never exists: 0.5 ms against 3.5 ms (2,048 tokens, 8
    # choices, width 256, 2 CPU cores).
    total = jnp.float32(0)
    for choice in range(slot_tA.shape[1]):
        y_tD = take(y_SD, slot_tA[:, choice]).astype(jnp.float32)
        total += y_tD if weights_tA is None else y_tD * weights_tA[:, choice, None]
    return total.astype(y_SD.dtype)


def to_experts(a: Array, capacity: int, spread: bool) -> Array:
    """[E * C, ...] of this shard -> [e, shards * C, ...]: all `expert` peers' slots for this
    device's experts, and where rows are spread over `model` those of its shards too."""
    rest = a.shape[1:]
    a = a.reshape(jax.lax.axis_size("expert"), -1, capacity, *rest)
    a = jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0)
    return together(jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *rest), spread, dim=1)


def from_experts(a: Array, capacity: int, spread: bool) -> Array:
    """The way back of `to_experts`; its transpose where rows are spread over `model`."""
    rest = a.shape[2:]
    a = parted(a, spread, dim=1)
    a = jnp.moveaxis(a.reshape(len(a), -1, capacity, *rest), 1, 0)
    return jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0).reshape(-1, *rest)


def together(a: Array, spread: bool, dim: int = 0) -> Array:
    """The parts of the rows that the shards of `model` have, behind one another; or `a`, where all
    have the same rows."""
    return jax.lax.all_gather(a, "model", axis=dim, tiled=True) if spread else a


def parted(a: Array, spread: bool, dim: int = 0) -> Array:
    """Sums over `model` of its shards' parts of F, each shard left with its own part of the rows;
    or `a`, where all have the same rows: to be added up once they are a token's (`completed`)."""
    if spread:
        return jax.lax.psum_scatter(a, "model", scatter_dimension=dim, tiled=True)
    return a


def completed(a: Array, spread: bool) -> Array:
    """The sum over `model` that `parted` has left out."""
    return a if spread else jax.lax.psum(a, "model")


def take(rows: Array, index: Array, fill: float = 0) -> Array:
    """rows[index]; out of bounds gives `fill`."""
    return rows.at[index].get(mode="fill", fill_value=fill)
