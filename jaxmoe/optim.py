"""Optimisers and learning-rate schedules, from optax; sharded as the parameters are, or over the
replicas as well."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh, transfer
from jaxmoe.adafactor import scale_by_adafactor
from jaxmoe.config import Config, OptimConfig
from jaxmoe.curriculum import curriculum
from jaxmoe.moments import kept
from jaxmoe.spec import Spec, is_spec, map_specs

Array = jax.Array
Schedule = Callable[[Any], Any]

# Keller Jordan's quintic iteration (kellerjordan.github.io/posts/muon): steepest at zero, so that
# five rounds bring every singular value near one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


# Powers of optim.batch_rule.
_RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Factors(NamedTuple):
    """What the rate is multiplied by from a step on, as the batch grows."""

    steps: tuple[int, ...]  # the first is 0
    factors: tuple[float, ...]


def batch_factors(config: Config) -> Factors | None:
    """By optim.batch_rule, relative to the largest batch of the run; None: the rate stands."""
    power, plan = _RULES[config.optim.batch_rule], curriculum(config)
    values = [(s.shape.tokens / plan.largest) ** power for s in plan.stretches]
    if all(value == 1 for value in values):
        return None
    return Factors(tuple(s.step for s in plan.stretches), tuple(values))


def rates(config: Config) -> np.ndarray:
    """float64 [steps]: learning rate of each update of a run over optim.lr."""
    return relative_path(config.optim, config.train.steps, batch_factors(config))


def schedule(cfg: OptimConfig, steps: int, factors: Factors | None = None) -> Schedule:
    """Learning rate of the update with index 0 .. steps - 1.

    wsd: linear warm-up, constant, linear decay over the last `decay_fraction` of all steps (Hu et
    al., arXiv:2404.06395; linear as in Haegele et al., arXiv:2405.18392). The warm-up's first
    update already moves, and `final_lr` is reached one update after the last.
    """
    if factors is not None:
        plain, firsts = schedule(cfg, steps), jnp.asarray(factors.steps[1:])
        values = jnp.asarray(factors.factors, jnp.float32)
        return lambda step: plain(step) * values[jnp.searchsorted(firsts, step, side="right")]
    after = max(1, steps - cfg.warmup_steps)
    if cfg.schedule == "wsd":
        decay = max(1, round(steps * cfg.decay_fraction))
        stable = optax.constant_schedule(cfg.lr)
        falling = optax.linear_schedule(cfg.lr, cfg.lr * cfg.final_lr, decay)
        body = optax.join_schedules([stable, falling], [max(0, after - decay)])
    elif cfg.schedule == "cosine":
        body = optax.cosine_decay_schedule(cfg.lr, after, alpha=cfg.final_lr)
    else:
        body = optax.constant_schedule(cfg.lr)
    if not cfg.warmup_steps:
        return body
    n = cfg.warmup_steps
    warmup = optax.linear_schedule(cfg.lr / n, cfg.lr, max(1, n - 1))
    return optax.join_schedules([warmup, body], [n])


def relative_path(cfg: OptimConfig, steps: int, factors: Factors | None = None) -> np.ndarray:
    """float64 [steps]: learning rate of each update over its peak, for the forecast."""
    path = jax.vmap(schedule(cfg, steps, factors))(jnp.arange(steps))
    return np.asarray(path, np.float64) / cfg.lr


def optimizer(
    cfg: OptimConfig, specs: Any, steps: int, factors: Factors | None = None
) -> optax.GradientTransformation:
    """Clipping by the global norm, the update rule, decoupled decay of the matrices, the rate."""
    matrices = map_specs(lambda s: s.is_matrix, specs)
    whole = optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        _carried_over(_rule(cfg, specs), cfg, specs),
        optax.add_decayed_weights(cfg.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(cfg, steps, factors)),
    )
    return _over_replicas(whole, cfg) if cfg.shard_over_replica else whole


def own_parts(arrays: Any, cfg: OptimConfig) -> Any:
    """Parameters or gradients as the optimiser has them: with shard_over_replica also sharded over
    `replica`, along the first dim that divides. Arrays without such a dim stay as they are."""

    def one(x: Array) -> Array:
        sharding = jax.typeof(x).sharding
        entries = [_axes(entry) for entry in sharding.spec]
        entries += [()] * (x.ndim - len(entries))
        dim = _own_dim(x.shape, entries, sharding.mesh)
        return x if dim is None else jax.reshard(x, sharding.update(spec=_own_spec(entries, dim)))

    return jax.tree.map(one, arrays) if cfg.shard_over_replica else arrays


def added_up(each: Any, cfg: OptimConfig) -> Any:
    """Gradients [replica, ...] of all replicas -> their sums, as `own_parts` has them. The only
    time that they cross `replica`: as float32, and as parameters rest."""

    def one(x: Array) -> Array:
        sharding = jax.typeof(x).sharding
        entries = [_axes(entry) for entry in sharding.spec]
        entries = [*entries, *[()] * (x.ndim - len(entries))][1:]
        dim = _own_dim(x.shape[1:], entries, sharding.mesh) if cfg.shard_over_replica else None

        def local(own: Array) -> Array:
            if dim is None:
                return jax.lax.psum(own[0], mesh.REPLICA)
            return jax.lax.psum_scatter(own[0], mesh.REPLICA, scatter_dimension=dim, tiled=True)

        out = P(*entries) if dim is None else _own_spec(entries, dim)
        return jax.shard_map(local, out_specs=out)(x)

    return jax.tree.map(one, each)


def _own_dim(shape: tuple[int, ...], entries: list[mesh.MeshAxes], on: Any) -> int | None:
    """The first dim that divides over the replicas, too; none where they already share one."""
    replicas = 1 if on.empty else on.shape[mesh.REPLICA]
    if replicas == 1 or any(mesh.REPLICA in axes for axes in entries):
        return None
    for dim, axes in enumerate(entries):
        if shape[dim] % (replicas * math.prod(on.shape[axis] for axis in axes)) == 0:
            return dim
    return None


def _own_spec(entries: list[mesh.MeshAxes], dim: int) -> P:
    """`replica` last of that dim's axes, so that each device cuts what it holds."""
    own = [(*axes, mesh.REPLICA) if i == dim else axes for i, axes in enumerate(entries)]
    return P(*(axes or None for axes in own))


def _axes(entry: Any) -> mesh.MeshAxes:
    """Of one dim of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _over_replicas(tx: Any, cfg: OptimConfig) -> optax.GradientTransformation:
    """`tx` on each replica's part; the updates are gathered."""

    def init(params: Any) -> Any:
        return tx.init(own_parts(params, cfg))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(own_parts(updates, cfg), state, own_parts(params, cfg))
        gathered = jax.tree.map(
            lambda update, param: jax.reshard(update, jax.typeof(param).sharding), updates, params
        )
        return gathered, state

    return optax.GradientTransformation(init, update)


def _carried_over(tx: Any, cfg: OptimConfig, specs: Any) -> optax.GradientTransformation:
    """`tx` with the rate and epsilon of each parameter as transfer.py has them: gradients over its
    factor of epsilon before, updates times its factor of the rate after. The state is that of `tx`.
    Decay comes later: it is not times a parameter's own rate."""
    known = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if s.base]
    if not known:
        return tx

    def rate(spec: Spec) -> float:
        by_muon = cfg.name == "muon" and spec.is_matrix
        return transfer.muon_rate(spec) if by_muon else transfer.adam_rate(spec)

    before = map_specs(lambda s: 1 / transfer.epsilon(s), specs)
    after = map_specs(rate, specs)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates = jax.tree.map(lambda u, factor: u * factor, updates, before)
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, factor: u * factor, updates, after), state

    return optax.GradientTransformation(tx.init, update)


def _rule(cfg: OptimConfig, specs: Any) -> optax.GradientTransformation:
    if cfg.name == "adafactor":
        return scale_by_adafactor(specs)
    adam = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps)
    adam = kept(adam, cfg.moments, specs)
    return adam if cfg.name == "adamw" else _muon(cfg, specs, adam)


def _muon(cfg: OptimConfig, specs: Any, adam: Any) -> optax.GradientTransformation:
    """Muon for matrices, Adam for the rest (Liu et al., arXiv:2502.16982)."""
    labels = map_specs(lambda s: "muon" if s.is_matrix else "adam", specs)

    def update(updates: Any, _: Any) -> Any:
        # Under `partition` the other group's leaves are masked nodes without an array.
        def one(spec: Spec, leaf: Any) -> Any:
            return orthogonalize(leaf, spec) if isinstance(leaf, jax.Array) else leaf

        return jax.tree.map(one, specs, updates, is_leaf=is_spec)

    momentum = kept(optax.trace(cfg.beta2, nesterov=True), cfg.moments, specs)
    muon = optax.chain(momentum, optax.stateless(update))
    return optax.partition({"muon": muon, "adam": adam}, labels)


def orthogonalize(update: Array, spec: Spec) -> Array:
    """The nearest (semi-)orthogonal matrix, scaled to the RMS of an Adam update.

    Each matrix of a stack (layers, experts) is one problem. Its dims are gathered, since the
    products mix all of them; stacks stay sharded as they are.
    """
    first = spec.own_dims[0]
    batch = spec.shape[:first]
    fan_out = spec.size // (math.prod(batch) * spec.fan_in)
    sharding = jax.typeof(update).sharding
    whole = jax.reshard(update, sharding.update(spec=P(*sharding.spec[:first])))
    ins = len(spec.inputs)
    in_order = spec.own_dims == tuple(range(first, len(spec.shape)))
    assert in_order and set(spec.axes[first : first + ins]) == set(spec.inputs), spec.axes
    matrix = whole.reshape(*batch, spec.fan_in, fan_out)
    scale = 0.2 * math.sqrt(max(spec.fan_in, fan_out))
    result = scale * _newton_schulz(matrix)
    return jax.reshard(result.reshape(spec.shape), sharding)


def _newton_schulz(x: Array, rounds: int = 5) -> Array:
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-1, -2), keepdims=True)) + 1e-7)
    for _ in range(rounds):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x
