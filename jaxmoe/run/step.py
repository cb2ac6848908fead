"""The train step and the evaluation step: pure functions of (state, batch, config).

With train.accumulate = n the batch is computed in n parts, one after another. Gradients of the sums
of the loss are added up and divided once by the weight of the whole batch, so that parts of uneven
weight give the big batch's gradient (what does not: config.py, router.load_balance_scope; and the
router's jitter, which is drawn by part).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh
from jaxmoe.config import Config
from jaxmoe.kernels.cross_entropy import LossSums
from jaxmoe.model.lm import Denominators, Lm, LmStats, denominators, lm_loss, move_balance_bias
from jaxmoe.model.router import RouterStats
from jaxmoe.optim import added_up
from jaxmoe.run import faults
from jaxmoe.run.state import TrainState, make_optimizer

Array = jax.Array


@struct.dataclass
class Batch:
    """Sequences with one token more than is predicted from: targets are the same, shifted."""

    tokens_BL: Any  # int32 [B, L + 1]
    weights_BL: Any  # float32 [B, L]; 0 leaves a target out
    documents_BL: Any = None  # int32 [B, L], 0 for padding; None: a row is one document
    sources_BY: Any = None  # float32 [B, Y], 1 for the source whose loss a row counts for
    limits: Any = None  # float32 [2]: of the loss and the gradient's norm (run/guard.py)
    fault: Any = None  # uint32 [3]: what is rehearsed in the step (run/faults.py)

    def inputs(self) -> Array:
        return self.tokens_BL[:, :-1]

    def targets(self) -> Array:
        return self.tokens_BL[:, 1:]


def abstract_batch(config: Config, where: Mesh | AbstractMesh) -> Batch:
    """Shapes, dtypes and shardings of a training batch.

    Raises:
        UserError: it does not divide over the mesh, or in train.accumulate parts.
    """
    train = config.train
    mesh.check_batch(where, "train.batch_size", train.batch_size, train.accumulate)
    rows = NamedSharding(where, P(mesh.BATCH, None))

    def shaped(length: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((train.batch_size, length), dtype, sharding=rows)

    def everywhere(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(where, P()))

    return Batch(
        tokens_BL=shaped(train.seq_len + 1, jnp.int32),
        weights_BL=shaped(train.seq_len, jnp.float32),
        documents_BL=shaped(train.seq_len, jnp.int32) if config.data.document_mask else None,
        limits=None if config.guard.bad_step == "stop" else everywhere((2,), jnp.float32),
        fault=everywhere((3,), jnp.uint32) if faults.strikes_step(config) else None,
    )


@struct.dataclass
class StepMetrics:
    """Of one step; stays on the device until the loop reads it, a step late."""

    sums: LossSums
    router: RouterStats | None  # of all layers with experts, on a leading dim X
    mtp_nll: Array  # [n_mtp], nats per token
    grad_norm: Array  # before clipping
    bad: Array | None = None  # bool []: beyond the batch's limits, so that the update is left out


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def train_step(state: TrainState, batch: Batch, config: Config) -> tuple[TrainState, StepMetrics]:
    """One update. The state is donated: its buffers are the new state's."""

    key = None
    if config.model.router.jitter:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    grads, (sums, stats) = gradients(state.params, batch, config, key)
    with jax.named_scope("optimizer"):
        updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
        if batch.fault is not None:
            updates = faults.in_rate(updates, batch.fault)
        params: Any = optax.apply_updates(state.params, updates)
    with jax.named_scope("balance_bias"):
        params = move_balance_bias(params, stats, config.model)
    new = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    with jax.named_scope("gradient_norm"):
        norm = optax.tree.norm(grads)
    bad = None
    if batch.limits is not None:
        values = jnp.stack([sums.nll / sums.weight, norm])
        bad = ~jnp.all(jnp.isfinite(values) & (values <= batch.limits))
        new = _unless(bad, new, state)
    return new, StepMetrics(
        sums=sums, router=stats.router, mtp_nll=stats.mtp_nll, grad_norm=norm, bad=bad
    )


def _unless(bad: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new`, or after a bad step what was before it; but the step and the rate's go on."""

    def either(a: Any, b: Any) -> Any:
        return a if _is_rate(a) else jax.tree.map(lambda x, y: jnp.where(bad, y, x), a, b)

    return jax.tree.map(either, new, old, is_leaf=_is_rate).replace(step=new.step)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def as_after(step: int, state: TrainState) -> TrainState:
    """The state as if `step` updates were done: the same parameters and moments."""

    def one(node: Any) -> Any:
        return node._replace(count=jnp.full_like(node.count, step)) if _is_rate(node) else node

    moved = jax.tree.map(one, state, is_leaf=_is_rate)
    return moved.replace(step=jnp.full_like(state.step, step))


def _is_rate(node: Any) -> bool:
    """Where the learning rate's schedule keeps its count, which follows the step."""
    return isinstance(node, optax.ScaleByScheduleState)


def gradients(
    params: Lm, batch: Batch, config: Config, key: Array | None = None
) -> tuple[Any, tuple[LossSums, LmStats]]:
    """Of the mean loss, sharded as the optimiser wants them; the sums and what the routers did.
    Each replica computes its own: they cross `replica` once."""
    run = _gradients if config.train.accumulate == 1 else _accumulated
    fault, batch = batch.fault, dataclasses.replace(batch, limits=None, fault=None)
    if mesh.ways((mesh.REPLICA,)) == 1:
        grads, aux = run(params, batch, config, key)
        return grads if fault is None else faults.in_gradients(grads, fault, config), aux

    def own(params: Lm, batch: Batch, key: Array | None) -> tuple[Any, Any]:
        grads, aux = run(params, batch, config, key)
        return jax.tree.map(lambda a: a[None], grads), aux

    each, aux = _by_replica(own, (P(mesh.REPLICA), P()), params, batch, key)
    if fault is not None:
        each = faults.in_gradients(each, fault, config)
    return added_up(each, config.optim), aux


def _by_replica(run: Any, out_specs: Any, params: Lm, batch: Batch, key: Array | None) -> Any:
    """`run` on the rows of each replica by itself: nothing crosses `replica` but what
    mesh.over_replicas adds up."""
    mapped = jax.shard_map(
        run,
        in_specs=(P(), P(mesh.REPLICA), P()),
        out_specs=out_specs,
        axis_names={mesh.REPLICA},
        check_vma=False,  # as in model/pipeline.py
    )
    return mapped(params, batch, key)


def _gradients(
    params: Lm, batch: Batch, config: Config, key: Array | None, whole: Denominators | None = None
) -> tuple[Any, tuple[LossSums, LmStats]]:
    """Of the mean loss; or, where the batch is a part of a `whole` one, of the part's sum."""

    def loss(params: Any) -> tuple[Array, tuple[LossSums, LmStats]]:
        sums, stats = _loss(params, batch, config, key, whole)
        return sums.total / sums.weight if whole is None else sums.total, (sums, stats)

    return jax.grad(loss, has_aux=True)(params)


def _accumulated(
    params: Lm, batch: Batch, config: Config, key: Array | None
) -> tuple[Any, tuple[LossSums, LmStats]]:
    """The same of train.accumulate parts of the batch. Gradients are added up as the parameters
    rest: float32, and spread over the same devices."""
    parts = config.train.accumulate
    whole = denominators(batch.inputs(), batch.weights_BL, batch.documents_BL, config.model)

    def add_part(total: Lm, part: tuple[Batch, Array]) -> tuple[Any, tuple[LossSums, LmStats]]:
        rows, number = part
        own = None if key is None else jax.random.fold_in(key, number)
        grads, aux = _gradients(params, rows, config, own, whole)
        return jax.tree.map(jnp.add, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    inputs = (mesh.in_parts(batch, parts), jnp.arange(parts))
    total, aux = jax.lax.scan(add_part, zeros, inputs)
    return jax.tree.map(lambda a: a / whole.weight, total), jax.tree.map(lambda a: a.sum(0), aux)


@partial(jax.jit, static_argnums=2)
def eval_step(params: Lm, batch: Batch, config: Config) -> LossSums:
    """Loss sums of a held-out batch; add them up, then divide."""

    def run(params: Lm, batch: Batch, key: None) -> LossSums:
        return _loss(params, batch, config, key)[0]

    if mesh.ways((mesh.REPLICA,)) == 1:
        return run(params, batch, None)
    return _by_replica(run, P(), params, batch, None)


def _loss(
    params: Any, batch: Batch, config: Config, key: Any, whole: Denominators | None = None
) -> tuple[LossSums, LmStats]:
    return lm_loss(
        params,
        batch.inputs(),
        batch.targets(),
        batch.weights_BL,
        config.model,
        documents_BL=batch.documents_BL,
        key=key,
        layout=config.mesh,
        whole=whole,
        sources_BY=batch.sources_BY,
    )


def add(a: LossSums, b: LossSums) -> LossSums:
    return jax.tree.map(jnp.add, a, b)
