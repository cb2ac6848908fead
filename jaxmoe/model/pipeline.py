"""Layers in a pipeline over the `stage` axis: an interleaved, circular schedule of microbatches
(Narayanan et al., arXiv:2104.04473, section 2.2), forward first, then backward by autodiff (GPipe,
arXiv:1811.06965).

Each of S stages holds `rounds` groups of layers: group k of stage s is part k * S + s of the
layers. A device's rows are cut into G groups of one slot; the S slots g of all stages are S
microbatches, which go through the stages one after another, `rounds` times around the ring:

    iteration t: stage s works on item i = t - s, which is microbatch i % S of group
    i // (rounds * S), in round i % (rounds * S) // S

so that what stage S - 1 sends is what stage 0 needs next, nothing waits, and of all
rounds * M + S - 1 iterations a stage idles in S - 1. Rows come from the stages in turn and go back
to where they were: what is before and after the pipeline (embedding, head, loss) has its batch
spread over `stage` as over any axis of the batch, hence is evenly shared by all stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MeshConfig
from jaxmoe.jax_versions import keep_free_axes
from jaxmoe.mesh import batch, ways

Array = jax.Array
AXIS = "stage"

keep_free_axes()

# (layers' parameters, their keys, x_BLD, what goes with the rows, what is common to all, number of
# the microbatch) -> y_BLD and sums that add up over parts
Part = Callable[[Any, Any, Array, Any, Any, Array], tuple[Array, Any]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is done when; all of it known before anything runs."""

    stages: int
    rounds: int
    groups: int  # of one microbatch a stage

    @property
    def microbatches(self) -> int:
        return self.groups * self.stages

    @property
    def lap(self) -> int:
        """Items that a stage works on for one group: its slot of every stage, round after round."""
        return self.rounds * self.stages

    @property
    def items(self) -> int:
        """That a stage works on."""
        return self.groups * self.lap

    @property
    def iterations(self) -> int:
        return self.items + self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of the iterations in which a stage idles."""
        return (self.stages - 1) / self.iterations


def schedule(layout: MeshConfig, stages: int, rows: int) -> Schedule:
    """For `rows` sequences a device. Where the wanted number of microbatches does not divide them
    (an evaluation's), the next smaller one that does."""
    wanted = layout.microbatches // stages or 2
    groups = next(g for g in range(min(wanted, rows), 0, -1) if rows % g == 0)
    return Schedule(stages=stages, rounds=layout.rounds, groups=groups)


def stages() -> int:
    """Of the mesh that the trace is for."""
    return ways((AXIS,))


def run(
    part: Part, params: Any, keys: Any, x_BLD: Array, beside: Any, common: Any, plan: Schedule
) -> tuple[Array, Any]:
    """All layers on x_BLD, each stage its own.

    Args:
        part: some consecutive layers. Compiled once; closes over no arrays.
        params: stacked on [layers] over `stage`, or on [rounds, layers] with rounds > 1; and
        keys: stacked likewise, or None.
        beside: arrays [B, L] that go with the rows; small, since every stage gets all of them.
        common: arrays that are the same for all rows and stages.

    Returns:
        y_BLD, and the sums of every layer over all microbatches, stacked on [all layers].
    """
    x = _split(x_BLD, plan)
    beside = jax.tree.map(lambda a: _everywhere(_split(a, plan)), beside)
    layers = P(None, AXIS) if plan.rounds > 1 else P(AXIS)
    mapped = jax.shard_map(
        lambda *args: _stage(part, plan, *args),
        in_specs=(layers, layers, P(AXIS), P(), P()),
        out_specs=(P(AXIS), layers),
        axis_names={AXIS},
        # Checked, residuals of a shard_map inside of this one get `stage` into their specs where
        # it cannot be (jax 0.10.2 and 0.12.0, shard_map.py, `nospec`).
        check_vma=False,
    )
    y, sums = mapped(params, keys, x, beside, common)
    return _joined(y), jax.tree.map(lambda a: _in_order(a, plan), sums)


# On one stage


def _stage(
    part: Part, plan: Schedule, params: Any, keys: Any, x: Array, beside: Any, common: Any
) -> tuple[Array, Any]:
    """x [1, G, ...]: this stage's rows. Params are its own, beside [S, G, ...] is of all stages."""
    me, n, x_GbLD = jax.lax.axis_index(AXIS), plan.stages, x[0]
    down = [(s, (s + 1) % n) for s in range(n)]  # to the next stage
    up = [(s, (s - 1) % n) for s in range(n)]
    zeros = jnp.zeros_like(x_GbLD[0])

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        waiting, entering, leaving, done_GbLD, sums = carry
        # Rows of all stages come to stage 0 in turn, one group after another.
        arriving, first = jnp.divmod(t, plan.lap)
        fresh = _at(x_GbLD, jnp.minimum(arriving, plan.groups - 1))
        entering = jnp.where(first == 0, fresh, entering)
        group, within = jnp.divmod(jnp.clip(t - me, 0, plan.items - 1), plan.lap)
        turn, slot = jnp.divmod(within, n)
        mine = jnp.where((me == 0) & (turn == 0), entering, waiting)
        of_rows = jax.tree.map(lambda a: _at(_at(a, slot), group), beside)
        number = group * n + slot
        valid = (t >= me) & (t - me < plan.items)
        y, more = _item(part, plan, params, mine, keys, valid, turn, (of_rows, common, number))
        if plan.rounds > 1:
            sums = jax.tree.map(lambda a, b: a.at[turn].add(b), sums, more)
        else:
            sums = jax.tree.map(jnp.add, sums, more)
        # The last stage's results go up: after S of them each is at the stage it came from.
        leaving = jax.lax.ppermute(leaving, AXIS, up)
        leaving = jnp.where(me == n - 1, y, leaving)
        out, last = jnp.divmod(t - (n - 1), plan.lap)
        put = jax.lax.dynamic_update_index_in_dim(done_GbLD, leaving, jnp.maximum(out, 0), 0)
        done_GbLD = jnp.where(last == plan.lap - 1, put, done_GbLD)
        waiting = jax.lax.ppermute(y, AXIS, down)
        entering = jax.lax.ppermute(entering, AXIS, up)
        return (waiting, entering, leaving, done_GbLD, sums), None

    rest = (jax.tree.map(lambda a: a[0, 0], beside), common, jnp.int32(0))
    none = _nothing(part, plan, params, keys, zeros, rest)
    start = (zeros, zeros, zeros, jnp.zeros_like(x_GbLD), none)
    (_, _, _, done_GbLD, sums), _ = jax.lax.scan(step, start, jnp.arange(plan.iterations))
    return done_GbLD[None], sums


def _nothing(part: Part, plan: Schedule, params: Any, keys: Any, x: Array, rest: Any) -> Any:
    """Sums of no item, for every layer of the stage."""
    of_round = lambda p, k, *args: part(_round(plan, p, 0), _round(plan, k, 0), *args)  # noqa: E731
    sums = _no_sums(of_round, params, keys, x, *rest)
    of_all = lambda a: jnp.zeros_like(a, shape=(plan.rounds, *a.shape))  # noqa: E731
    return jax.tree.map(of_all, sums) if plan.rounds > 1 else sums


def _no_sums(layers: Callable[..., tuple[Array, Any]], *args: Any) -> Any:
    _, sums = jax.eval_shape(layers, *args)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)


def _round(plan: Schedule, stacked: Any, turn: Any) -> Any:
    """Of a stage's arrays those of one round."""
    if plan.rounds == 1:
        return stacked
    return jax.tree.map(lambda a: _at(a, turn), stacked)


# An item: the layers of one round on one microbatch, or nothing in a bubble. Its VJP is our own:
# autodiff would keep the parameters of every iteration, since what a `cond` keeps is not seen to be
# the same each time. So an item keeps its input, and is computed again on the way back.


def _run_item(
    part: Part,
    plan: Schedule,
    params: Any,
    x: Array,
    keys: Any,
    valid: Array,
    turn: Array,
    rest: Any,
) -> tuple[Array, Any]:
    def busy(x: Array) -> tuple[Array, Any]:
        return part(_round(plan, params, turn), _round(plan, keys, turn), x, *rest)

    def idle(x: Array) -> tuple[Array, Any]:
        return x, _no_sums(busy, x)

    # All devices of a stage go the same way, so collectives within it are safe.
    return jax.lax.cond(valid, busy, idle, x)


def _item_fwd(part: Part, plan: Schedule, *args: Any) -> tuple[Any, Any]:
    return _run_item(part, plan, *args), args


def _item_bwd(part: Part, plan: Schedule, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    params, x, keys, valid, turn, rest = kept

    def run(own: Any, x: Array) -> tuple[Array, Any]:
        return part(own, _round(plan, keys, turn), x, *rest)

    def busy(cotangents: Any) -> tuple[Any, Array]:
        _, pull = jax.vjp(run, _round(plan, params, turn), x)
        return pull(cotangents)

    def idle(cotangents: Any) -> tuple[Any, Array]:
        zeros = jax.tree.map(jnp.zeros_like, _round(plan, params, 0))
        return zeros, cotangents[0]

    own, dx = jax.lax.cond(valid, busy, idle, cotangents)
    if plan.rounds > 1:
        put = lambda a, d: jnp.zeros_like(a).at[turn].set(d)  # noqa: E731
        own = jax.tree.map(put, params, own)
    return own, dx, None, None, None, None


_item: Any = jax.custom_vjp(_run_item, nondiff_argnums=(0, 1))
_item.defvjp(_item_fwd, _item_bwd)


# Between a batch over all stages and microbatches


def _spec(a: Array) -> tuple[Any, ...]:
    """Mesh axes of the dims, as they are inside of the pipeline: [b, ...] without `stage`."""
    rest = tuple(jax.typeof(a).sharding.spec)[1:]
    return (tuple(axis for axis in batch() if axis != AXIS), *rest)


def _split(a: Array, plan: Schedule) -> Array:
    """[B, L, ...] -> [S, G, b, L, ...]: each device cuts its own rows, nothing moves."""

    def local(a: Array) -> Array:
        return a.reshape(1, plan.groups, -1, *a.shape[1:])

    own = jax.typeof(a).sharding.spec
    return jax.shard_map(local, in_specs=own, out_specs=P(AXIS, None, *_spec(a)))(a)


def _joined(a: Array) -> Array:
    """The inverse of `_split`."""
    own = jax.typeof(a).sharding.spec

    def local(a: Array) -> Array:
        return a.reshape(-1, *a.shape[3:])

    return jax.shard_map(local, in_specs=own, out_specs=P(batch(), *tuple(own)[3:]))(a)


def _everywhere(a: Array) -> Array:
    """A split array, the same on all stages."""
    return jax.reshard(a, P(None, *tuple(jax.typeof(a).sharding.spec)[1:]))


def _at(a: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(a, index, keepdims=False)


def _in_order(a: Array, plan: Schedule) -> Array:
    """Sums by layer: small, so all devices get all."""
    a = jax.reshard(a, P(*(None,) * a.ndim))
    return a.reshape(-1, *a.shape[2:]) if plan.rounds > 1 else a
