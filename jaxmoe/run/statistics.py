"""Of every parameter, by layer: its size and a checksum of its bits, so that two runs can be
compared where their parameters are long gone.

A checksum is the sum of all words modulo 2^32: the same on every mesh, as long as the bits are.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe import tree
from jaxmoe.config import Config
from jaxmoe.run.state import param_specs
from jaxmoe.spec import BATCH_AXES, Spec, is_spec

__all__ = ["faint_experts", "statistics"]

LAYERS = tuple(axis for axis in BATCH_AXES if axis != "experts")
# Of the middle expert's size. Trained ones keep more than 0.8 of it; one that was zeroed grows back
# by the moments' inertia, to 0.06 within 22 steps of small runs (LOG.md, 2026-11-23).
FAINT = 0.2

Statistics = dict[str, dict[str, Any]]


def statistics(params: Any, config: Config) -> Statistics:
    """By name of the array: `rms`, six digits, and `sum`, a value for each layer in order, or one
    for what is in no layer; of experts also `least`, the smallest one's size over the middle
    one's."""
    return {
        name: {key: _values(value) for key, value in found.items()}
        for name, found in jax.device_get(_by_layer(params, config)).items()
    }


def faint_experts(found: Statistics) -> Iterator[tuple[str, int, float]]:
    """(array, layer, share of the middle one's size) where an expert has all but vanished."""
    for name, one in found.items():
        for layer, share in enumerate(one.get("least", ())):
            if share < FAINT:
                yield name, layer, share


def _values(found: np.ndarray) -> list[float] | list[int]:
    values = found.reshape(-1).tolist()
    return [float(f"{v:.6g}") for v in values] if found.dtype == np.float32 else values


@partial(jax.jit, static_argnums=1)
def _by_layer(params: Any, config: Config) -> dict[str, dict[str, jax.Array]]:
    specs = dict(tree.named_leaves(param_specs(config), is_leaf=is_spec))
    return {name: _of(specs[name], array) for name, array in tree.named_leaves(params)}


def _of(spec: Spec, array: jax.Array) -> dict[str, jax.Array]:
    """[layers] each, or [] where it has no such dim."""
    inner = tuple(dim for dim, axis in enumerate(spec.axes) if axis not in LAYERS)
    words = jax.lax.bitcast_convert_type(array, jnp.uint32)
    total = jnp.sum(words, axis=inner, dtype=jnp.uint32)
    found = {"rms": _rms(array, inner), "sum": jax.reshard(total, P())}
    if "experts" in spec.axes:
        each = _rms(array, tuple(dim for dim in inner if spec.axes[dim] != "experts"))
        middle = jnp.median(each, axis=-1)
        found["least"] = jnp.where(middle > 0, each.min(-1) / jnp.where(middle > 0, middle, 1), 1)
    return found


def _rms(array: jax.Array, over: tuple[int, ...]) -> jax.Array:
    size = np.prod([array.shape[dim] for dim in over], dtype=np.int64)
    return jax.reshard(jnp.sqrt(jnp.sum(jnp.square(array), axis=over) / float(size)), P())
