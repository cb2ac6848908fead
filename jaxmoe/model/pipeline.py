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
from jaxmoe.mesh import batch

Array = jax.Array
AXIS = "stage"

# (layers' parameters, x_BLD, what goes with the rows, what is common to all, number of the
# microbatch) -> y_BLD and sums that add up over parts
Part = Callable[[Any, Array, Any, Any, Array], tuple[Array, Any]]


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
    def items(self) -> int:
        """That a stage works on."""
        return self.rounds * self.microbatches

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
    return dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)


def run(
    part: Part, params: Any, x_BLD: Array, beside: Any, common: Any, plan: Schedule
) -> tuple[Array, Any]:
    """All layers on x_BLD, each stage its own.

    Args:
        part: some consecutive layers. Compiled once.
        params: stacked on [layers] over `stage`, or on [rounds, layers] with rounds > 1.
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
        in_specs=(layers, P(AXIS), P(), P()),
        out_specs=(P(AXIS), layers),
        axis_names={AXIS},
        # Checked, residuals of a shard_map inside of this one get `stage` into their specs where
        # it cannot be (jax 0.10.2 and 0.12.0, shard_map.py, `nospec`).
        check_vma=False,
    )
    y, sums = mapped(params, x, beside, common)
    return _joined(y), jax.tree.map(lambda a: _in_order(a, plan), sums)


# On one stage


def _stage(
    part: Part, plan: Schedule, params: Any, x: Array, beside: Any, common: Any
) -> tuple[Array, Any]:
    """x [1, G, ...]: this stage's rows. Params are its own, beside [S, G, ...] is of all stages."""
    me, n, x_GbLD = jax.lax.axis_index(AXIS), plan.stages, x[0]
    down = [(s, (s + 1) % n) for s in range(n)]  # to the next stage
    up = [(s, (s - 1) % n) for s in range(n)]
    work = _work(part, plan, params, common)
    zeros = jnp.zeros_like(x_GbLD[0])

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        waiting, entering, leaving, done_GbLD, sums = carry
        # Rows of all stages come to stage 0 in turn, one group after another.
        group, first = jnp.divmod(t, plan.rounds * n)
        fresh = jax.lax.dynamic_index_in_dim(
            x_GbLD, jnp.minimum(group, plan.groups - 1), keepdims=False
        )
        entering = jnp.where(first == 0, fresh, entering)
        item = jnp.clip(t - me, 0, plan.items - 1)
        turn, slot = jnp.divmod(item % (plan.rounds * n), n)
        mine = jnp.where((me == 0) & (turn == 0), entering, waiting)
        of_rows = jax.tree.map(lambda a: _pick(a, slot, item // (plan.rounds * n)), beside)
        number = item // (plan.rounds * n) * n + slot
        valid = (t >= me) & (t - me < plan.items)
        y, sums = work(valid, turn, number, mine, of_rows, sums)
        # The last stage's results go up: after S of them each is at the stage it came from.
        leaving = jax.lax.ppermute(leaving, AXIS, up)
        leaving = jnp.where(me == n - 1, y, leaving)
        out, last = jnp.divmod(t - (n - 1), plan.rounds * n)
        put = jax.lax.dynamic_update_index_in_dim(done_GbLD, leaving, jnp.maximum(out, 0), 0)
        done_GbLD = jnp.where(last == plan.rounds * n - 1, put, done_GbLD)
        waiting = jax.lax.ppermute(y, AXIS, down)
        entering = jax.lax.ppermute(entering, AXIS, up)
        return (waiting, entering, leaving, done_GbLD, sums), None

    start = (zeros, zeros, zeros, jnp.zeros_like(x_GbLD), work.nothing(zeros, beside))
    (_, _, _, done_GbLD, sums), _ = jax.lax.scan(step, start, jnp.arange(plan.iterations))
    return done_GbLD[None], sums


class _work:
    """One item: the layers of one round on one microbatch, and their sums added to those before."""

    def __init__(self, part: Part, plan: Schedule, params: Any, common: Any) -> None:
        self.part, self.plan, self.params, self.common = part, plan, params, common

    def nothing(self, x: Array, beside: Any) -> Any:
        """Sums of no item."""
        rows = jax.tree.map(lambda a: a[0, 0], beside)
        _, sums = jax.eval_shape(lambda *a: self._layers(0, 0, *a), x, rows)
        rounds = self.plan.rounds
        shape = lambda a: (rounds, *a.shape) if rounds > 1 else a.shape  # noqa: E731
        return jax.tree.map(lambda a: jnp.zeros(shape(a), a.dtype), sums)

    def _layers(self, turn: Any, number: Any, x: Array, rows: Any) -> tuple[Array, Any]:
        params = self.params
        if self.plan.rounds > 1:
            pick = lambda a: jax.lax.dynamic_index_in_dim(a, turn, keepdims=False)  # noqa: E731
            params = jax.tree.map(pick, params)
        return self.part(params, x, rows, self.common, number)

    def __call__(
        self, valid: Array, turn: Array, number: Array, x: Array, rows: Any, sums: Any
    ) -> tuple[Array, Any]:
        def busy(x: Array, rows: Any, sums: Any) -> tuple[Array, Any]:
            y, more = self._layers(turn, number, x, rows)
            if self.plan.rounds == 1:
                return y, jax.tree.map(jnp.add, sums, more)
            return y, jax.tree.map(lambda a, b: a.at[turn].add(b), sums, more)

        # All devices of a stage go the same way, so collectives within it are safe.
        return jax.lax.cond(valid, busy, lambda x, rows, sums: (x, sums), x, rows, sums)


# Between a batch over all stages and microbatches


def _spec(a: Array) -> tuple[Any, ...]:
    """Mesh axes of the dims, as they are inside of the pipeline: [b, ...] without `stage`."""
    rest = tuple(jax.typeof(a).sharding.spec)[1:]
    return (tuple(axis for axis in batch() if axis != AXIS), *rest)


def _split(a: Array, plan: Schedule) -> Array:
    """[B, L, ...] -> [S, G, b, L, ...]: each device cuts its own rows, nothing moves."""

    def local(a: Array) -> Array:
        return a.reshape(1, plan.groups, -1, *a.shape[1:])

    return jax.shard_map(local, out_specs=P(AXIS, None, *_spec(a)))(a)


def _joined(a: Array) -> Array:
    """The inverse of `_split`."""
    rest = tuple(jax.typeof(a).sharding.spec)[3:]

    def local(a: Array) -> Array:
        return a.reshape(-1, *a.shape[3:])

    return jax.shard_map(local, out_specs=P(batch(), *rest))(a)


def _everywhere(a: Array) -> Array:
    """A split array, the same on all stages."""
    return jax.reshard(a, P(None, *tuple(jax.typeof(a).sharding.spec)[1:]))


def _pick(a: Array, stage: Array, group: Array) -> Array:
    row = jax.lax.dynamic_index_in_dim(a, stage, keepdims=False)
    return jax.lax.dynamic_index_in_dim(row, group, keepdims=False)


def _in_order(a: Array, plan: Schedule) -> Array:
    """Sums by layer: small, so all devices get all."""
    a = jax.reshard(a, P(*(None,) * a.ndim))
    return a.reshape(-1, *a.shape[2:]) if plan.rounds > 1 else a
