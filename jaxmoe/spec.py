"""A parameter is declared once, as data: shape, logical axes, init, dtype. The rest is derived.

`x_specs(cfg)` in jaxmoe.model returns a tree of `Spec`; from it come init, shardings, counts,
decay masks, the matrix view an optimiser needs, and the names in checkpoints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmoe import tree
from jaxmoe.errors import UserError

# Dims that only enumerate matrices: not part of any of them.
BATCH_AXES = ("rounds", "layers", "others", "experts")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One parameter.

    Attributes:
        shape: sizes of the dims.
        axes: logical axis of each dim; mesh.STORE and mesh.COMPUTE map them to mesh axes.
        inputs: the logical axes that are summed over in the forward pass; their sizes give fan-in.
        init: "normal" draws with std = gain / sqrt(fan_in).
        gain: see init.
        cast: whether the layer uses it in the compute dtype (False: stays float32).
        base: sizes of its own dims in the model that rates were tuned on (transfer.py); (): here.
        depth: layers of the model over those of that one, for a parameter inside of a layer.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    init: Literal["normal", "zeros", "ones"] = "normal"
    gain: float = 1.0
    cast: bool = True
    base: tuple[int, ...] = ()
    depth: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def own_dims(self) -> tuple[int, ...]:
        """Those of one matrix of the stack."""
        return tuple(i for i, axis in enumerate(self.axes) if axis not in BATCH_AXES)

    @property
    def fan_in(self) -> int:
        sizes = dict(zip(self.axes, self.shape, strict=True))
        return math.prod(sizes[axis] for axis in self.inputs)

    @property
    def fan_out(self) -> int:
        """Of one matrix: what `fan_in` values become; of a vector its size."""
        return math.prod(self.shape[i] for i in self.own_dims) // self.fan_in

    @property
    def tuned(self) -> "Spec":
        """One matrix of it in the model that rates were tuned on."""
        axes = tuple(self.axes[i] for i in self.own_dims)
        shape = self.base or tuple(self.shape[i] for i in self.own_dims)
        return replace(self, shape=shape, axes=axes, base=())

    @property
    def is_matrix(self) -> bool:
        """Whether it mixes features, so that weight decay and Muon apply (norms, biases and
        embeddings do not)."""
        return bool(self.inputs) and "vocab" not in self.axes


def is_spec(x: Any) -> bool:
    return isinstance(x, Spec)


def map_specs(f: Callable[[Spec], Any], specs: Any) -> Any:
    return jax.tree.map(f, specs, is_leaf=is_spec)


def stack(specs: Any, n: int, axis: str) -> Any:
    """The specs of n equal layers, stacked on a leading dim for a scan. Axis: "layers" of those
    that a pipeline spreads over its stages, "others"."""
    return map_specs(lambda s: replace(s, shape=(n, *s.shape), axes=(axis, *s.axes)), specs)


def in_rounds(specs: Any, rounds: int) -> Any:
    """The same parameters with the leading `layers` dim as [rounds, layers of a round], so that
    each stage of a pipeline has a part of every round. In memory they are the same array.

    Raises:
        UserError: the layers do not divide into rounds.
    """

    def one(s: Spec) -> Spec:
        if rounds == 1 or s.axes[0] != "layers":
            return s
        if s.shape[0] % rounds:
            raise UserError(
                f"mesh.rounds={rounds} does not divide the {s.shape[0]} repeats of the layers that"
                " the pipeline spreads; set it to a divisor"
            )
        shape = (rounds, s.shape[0] // rounds, *s.shape[1:])
        return replace(s, shape=shape, axes=("rounds", *s.axes))

    return map_specs(one, specs)


def init(specs: Any, key: jax.Array) -> Any:
    """float32 parameters. Each tensor's draw depends on the key and its own name only."""
    return tree.map_named(lambda n, s: _draw(s, tree.fold_name(key, n)), specs, is_leaf=is_spec)


def count(specs: Any) -> int:
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))


def _draw(spec: Spec, key: jax.Array) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, jnp.float32)
    if spec.init == "ones":
        return jnp.ones(spec.shape, jnp.float32)
    std = spec.gain / math.sqrt(spec.fan_in)
    return std * jax.random.normal(key, spec.shape, jnp.float32)
