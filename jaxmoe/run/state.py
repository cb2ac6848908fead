"""What a training step carries, and how it is made on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh as mesh_lib
from jaxmoe import spec as spec_lib
from jaxmoe.config import Config, replace
from jaxmoe.model.lm import lm_specs
from jaxmoe.optim import batch_factors, optimizer


@struct.dataclass
class TrainState:
    step: Any  # int32 []: updates done
    params: Any  # an Lm
    opt_state: Any


def param_specs(config: Config) -> Any:
    """The model's, laid out for the rounds of the pipeline."""
    return spec_lib.in_rounds(lm_specs(config.model), config.mesh.rounds)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    factors = batch_factors(config)
    return optimizer(config.optim, param_specs(config), config.train.steps, factors)


def abstract_state(config: Config, mesh: Any, rules: mesh_lib.Rules = mesh_lib.STORE) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh (which may be abstract).

    The moments' shardings are not written anywhere: they follow from the parameters' types.
    """
    shardings = mesh_lib.shardings(param_specs(config), mesh, rules)
    params = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=sharding),
        param_specs(config),
        shardings,
        is_leaf=spec_lib.is_spec,
    )
    opt_state = jax.eval_shape(make_optimizer(config).init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return mesh_lib.concrete(TrainState(step=step, params=params, opt_state=opt_state), mesh)


def state_as_saved(config: Config, mesh: Any, rounds: int) -> TrainState:
    """The abstract state of a checkpoint whose run had `rounds` of the pipeline. With others: its
    layers are whole on every stage, since they need not divide over the stages of this mesh. With
    the same number, just `abstract_state`."""
    if rounds == config.mesh.rounds:
        return abstract_state(config, mesh)
    there = replace(config, mesh=replace(config.mesh, rounds=rounds))
    return abstract_state(there, mesh, {**mesh_lib.STORE, "layers": ()})


def relaid(values: Any, like: Any) -> Any:
    """The same values in the shapes and shardings of `like`: layers that were stacked for another
    number of the pipeline's rounds. The values are used up, one array after another, since each is
    whole over `stage` for a moment."""

    def one(value: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if value.shape == wanted.shape:
            return jax.device_put(value, wanted.sharding)
        rest = tuple(wanted.sharding.spec)[-_common(value.shape, wanted.shape) :]

        def move(a: jax.Array) -> jax.Array:
            a = jax.reshard(a, P(*(None,) * (a.ndim - len(rest)), *rest))
            new = P(*(None,) * (len(wanted.shape) - len(rest)), *rest)
            return a.reshape(wanted.shape, out_sharding=new)

        moved = jax.jit(move, out_shardings=wanted.sharding)(value)
        value.delete()  # another shape cannot take a donated buffer
        return moved

    return jax.tree.map(one, values, like)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many trailing dims are the same."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def init_state(config: Config, mesh: Mesh, params: Any = None) -> TrainState:
    """A fresh state; the same values on every mesh. `params` are taken instead of drawn ones."""
    out = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    opt_state = lambda params: make_optimizer(config).init(params)  # noqa: E731

    def make(key: jax.Array) -> TrainState:
        params = spec_lib.init(param_specs(config), key)
        return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state(params))

    if params is None:
        return jax.jit(make, out_shardings=out)(jax.random.key(config.seed))
    step = jax.device_put(jnp.int32(0), out.step)
    moments = jax.jit(opt_state, out_shardings=out.opt_state)(params)
    return TrainState(step=step, params=params, opt_state=moments)
