"""Optimiser moments kept in less than float32; they are computed with in float32.

bfloat16: two bytes. int8: one byte a value and a float32 scale a row, after Dettmers et al.
(arXiv:2110.02861), with two differences. A block is a whole row along one dim, so that no shape
depends on the mesh and every dim stays shardable; its codes are powers, which are as precise for
the small values of a row as for its largest. Second moments are kept as their square roots, and
what is not zero stays so. As in the paper vectors and what has a vocabulary dim stay in float32.

Rounding is stochastic: what is stored is right in the mean, so that a moment that moves by less
than a step of its codes still moves (at beta2 = 0.999 a nearest bfloat16 would never fall). The
draw depends on the update's number and the parameter's name: a resumed run is the unbroken one.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoe import mesh, tree
from jaxmoe.spec import Spec, is_spec

Array = jax.Array
Kind = Literal["float32", "bfloat16", "int8"]

# Codes of one sign, and the octaves they span below a row's largest value. A step is 8 % for first
# moments (down to 6e-5 of the largest), 5.6 % for roots of second ones (down to 1e-6).
SIGNED = (127, 14.0)
ROOTS = (255, 20.0)


class Codes(NamedTuple):
    """Of a moment: sign * scale * 2^((|code| - top) * step); 0 is zero."""

    codes: Any  # int8, or uint8 for roots of second moments
    scale: Any  # float32, the largest of each row; its dim stays, with size 1


class Kept(NamedTuple):
    count: Array  # int32 []: updates done
    inner: Any  # the optimiser's state, its moments as they are kept


def kept(tx: Any, kind: Kind, specs: Any) -> optax.GradientTransformation:
    """`tx` (optax.scale_by_adam or optax.trace), its moments kept as `kind` says."""
    if kind == "float32":
        return tx

    def pack(state: Any, count: Any) -> Kept:
        key = jax.random.fold_in(jax.random.key(0), count)
        return Kept(count=count, inner=_each_moment(state, lambda m, r: _pack(m, r, key)))

    def _pack(moment: Any, roots: bool, key: Array) -> Any:
        def one(name: str, spec: Spec, x: Any) -> Any:
            own = tree.fold_name(jax.random.fold_in(key, roots), name)
            return encode(x, spec, kind, own, roots=roots) if isinstance(x, jax.Array) else x

        return tree.map_named(one, specs, moment, is_leaf=is_spec)

    def _unpack(moment: Any, roots: bool) -> Any:
        def one(_: Spec, x: Any) -> Any:
            return decode(x, roots=roots) if isinstance(x, jax.Array | Codes) else x

        return jax.tree.map(one, specs, moment, is_leaf=is_spec)

    def init(params: Any) -> Kept:
        return pack(tx.init(params), jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, inner = tx.update(updates, _each_moment(state.inner, _unpack), params)
        return updates, pack(inner, optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def encode(x: Array, spec: Spec, kind: Kind, key: Array, *, roots: bool) -> Any:
    """float32 -> bfloat16, Codes, or float32 where `kind` leaves it. `roots`: x >= 0 is kept as
    its square root."""
    if kind == "bfloat16":
        # The half of the bits that is cut off, plus a random half, carries into the rest.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_bits(x, key) >> 16)
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    if not spec.is_matrix:
        return x
    top, octaves = ROOTS if roots else SIGNED
    step = octaves / (top - 1)
    sizes = jnp.sqrt(x) if roots else jnp.abs(x)
    scale = sizes.max(_row_dim(spec), keepdims=True)
    parts = sizes / jnp.where(scale > 0, scale, 1)
    chance = (_bits(x, key) >> 8).astype(jnp.float32) * 2.0**-24
    below = jnp.floor(top + jnp.log2(parts) / step)  # -inf at zero
    low = jnp.maximum(below, 1)
    # Between two codes by the distance in value: the mean is the value.
    above = (parts * jnp.exp2((top - low) * step) - 1) / (2**step - 1)
    code = jnp.minimum(low + (chance < above), top)
    least = parts > 0 if roots else chance < parts * 2**octaves
    code = jnp.where(below < 1, least.astype(jnp.float32), code)
    if roots:
        return Codes(codes=code.astype(jnp.uint8), scale=scale)
    return Codes(codes=(jnp.sign(x) * code).astype(jnp.int8), scale=scale)


def decode(stored: Any, *, roots: bool) -> Array:
    """What `encode` has kept, in float32."""
    if not isinstance(stored, Codes):
        return stored.astype(jnp.float32)
    top, octaves = ROOTS if roots else SIGNED
    code = stored.codes.astype(jnp.float32)
    sizes = stored.scale * jnp.exp2((jnp.abs(code) - top) * (octaves / (top - 1)))
    return sizes**2 * (code > 0) if roots else sizes * jnp.sign(code)


def _row_dim(spec: Spec) -> int:
    """The longest dim that no mesh shards, if it is worth a scale; else the last one, whose
    largest values are then sought over devices."""
    own = spec.own_dims
    whole = [i for i in own if not mesh.STORE[spec.axes[i]] and spec.shape[i] >= 64]
    return max(whole, key=lambda i: spec.shape[i], default=own[-1])


def _bits(x: Array, key: Array) -> Array:
    """Random uint32s, the same on every mesh."""
    sharding = jax.typeof(x).sharding
    there = {} if sharding.mesh.empty else {"out_sharding": sharding}
    return jax.random.bits(key, x.shape, jnp.uint32, **there)


def _each_moment(state: Any, f: Any) -> Any:
    """The state with f(moment, is it a second one) for each of its moments."""
    found = {
        name: f(getattr(state, name), name == "nu")
        for name in ("mu", "nu", "trace")
        if name in state._fields
    }
    return state._replace(**found)
