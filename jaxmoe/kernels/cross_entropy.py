"""Cross-entropy fused with the output head, in chunks of the sequence, with its own VJP.

The logits of `chunk` positions live at one time, so no [B, L, V] array ever exists. The gradient
is taken while the logits are at hand, in the forward pass: the backward pass only scales it, and
nothing is computed twice.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


@struct.dataclass
class LossSums:
    """Sums over tokens, so that uneven batches and shards add up before they are divided.

    `total` carries the gradient; the others are for reading.
    """

    total: Array  # nll + options.z_coef * z, weighted; nats
    nll: Array  # weighted; nats
    z: Array  # logsumexp^2, weighted
    weight: Array
    nll_Y: Array | None = None  # the same by source, where sources are told
    weight_Y: Array | None = None


def cross_entropy(
    x_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    *,
    chunk: int,
    z_coef: float,
    soft_cap: float | None = None,
    sources_BY: Array | None = None,
) -> LossSums:
    """Sums of -log softmax(x @ head)[target] and of the z-loss (PaLM, arXiv:2204.02311, sec. 5).

    Args:
        x_BLD: final hidden states, compute dtype.
        head_DV: output matrix, compute dtype; V may be sharded.
        targets_BL: int32 token ids.
        weights_BL: float32; 0 leaves a position out.
        chunk: positions of each sequence handled at a time by a device; divides its part of L.
        z_coef: weight of the z-loss.
        soft_cap: logits become cap * tanh(logit / cap) (Gemma 2, arXiv:2408.00118).
        sources_BY: float32, how much each sequence counts for each source in `nll_Y`; None: there
            are no sums by source, and nothing else changes.
    """
    options = _Options(chunk, z_coef, soft_cap)
    inputs = (x_BLD, head_DV, targets_BL, weights_BL, sources_BY)
    total, (nll, z, nll_Y) = _sums(*inputs, options)
    weight_Y = _by_source(weights_BL, sources_BY)
    weight = weights_BL.sum()
    return LossSums(total=total, nll=nll, z=z, weight=weight, nll_Y=nll_Y, weight_Y=weight_Y)


def soft_capped(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class _Options(NamedTuple):
    chunk: int
    z_coef: float
    soft_cap: float | None


# Of one chunk, or summed up: nll, z, and nll by source where sources are told.
_Sums = tuple[Array, Array, Array | None]


def _no_sums(sources_BY: Array | None) -> _Sums:
    none_Y = None if sources_BY is None else jnp.zeros(sources_BY.shape[1], jnp.float32)
    return jnp.float32(0), jnp.float32(0), none_Y


def _by_source(values: Array, sources_BY: Array | None) -> Array | None:
    """`values`: of the positions of a chunk, or of all, [B, positions]."""
    if sources_BY is None:
        return None
    exact, out = jax.lax.Precision.HIGHEST, _on(values, None)
    return jnp.einsum("BL,BY->Y", values, sources_BY, precision=exact, out_sharding=out)


def _plain_sums(
    x_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    sources_BY: Array | None,
    options: _Options,
) -> tuple[Array, _Sums]:
    def step(carry: _Sums, inputs: Any) -> tuple[_Sums, None]:
        sums, _ = _chunk_sums(inputs, head_DV, sources_BY, options.soft_cap)
        return jax.tree.map(jnp.add, carry, sums), None

    chunks = _chunks(options.chunk, x_BLD, targets_BL, weights_BL)
    sums, _ = jax.lax.scan(step, _no_sums(sources_BY), chunks)
    return sums[0] + options.z_coef * sums[1], sums


def _forward(
    x_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    sources_BY: Array | None,
    options: _Options,
) -> tuple[Any, Any]:
    def step(carry: Any, inputs: Any) -> tuple[Any, Array]:
        sums, dhead_DV = carry
        x_BlD, targets_Bl, weights_Bl = inputs
        more, (logits_BlV, lse_Bl) = _chunk_sums(inputs, head_DV, sources_BY, options.soft_cap)
        # d/dlogit of nll is p - onehot(target); of z_coef * lse^2, 2 * z_coef * lse * p.
        p_BlV = jnp.exp(logits_BlV - lse_Bl[..., None])
        scaled_BlV = p_BlV * (1 + 2 * options.z_coef * lse_Bl)[..., None]
        hit_BlV = _is_target(targets_Bl, logits_BlV)
        dlogits_BlV = (scaled_BlV - hit_BlV) * weights_Bl[..., None]
        if options.soft_cap is not None:  # d tanh = 1 - tanh^2
            dlogits_BlV *= 1 - (logits_BlV / options.soft_cap) ** 2
        dlogits_BlV = dlogits_BlV.astype(x_BlD.dtype)
        with jax.named_scope("head"):
            dx_BlD = jnp.einsum(
                "BlV,DV->BlD", dlogits_BlV, head_DV, out_sharding=jax.typeof(x_BlD).sharding
            )
            dhead_DV += jnp.einsum(
                "BlD,BlV->DV",
                x_BlD,
                dlogits_BlV,
                preferred_element_type=jnp.float32,
                out_sharding=jax.typeof(head_DV).sharding,
            )
        return (jax.tree.map(jnp.add, sums, more), dhead_DV), dx_BlD

    zero = (_no_sums(sources_BY), jnp.zeros_like(head_DV, dtype=jnp.float32))
    (sums, dhead_DV), dx_nBlD = jax.lax.scan(
        step, zero, _chunks(options.chunk, x_BLD, targets_BL, weights_BL)
    )
    dx_BLD = _whole(dx_nBlD, options.chunk, like=x_BLD)
    total = sums[0] + options.z_coef * sums[1]
    return (total, sums), (dx_BLD, dhead_DV.astype(head_DV.dtype))


def _backward(_: _Options, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    dx_BLD, dhead_DV = residuals
    scale = cotangents[0]  # of `total`; the others are for reading and carry no gradient
    return (
        dx_BLD * scale.astype(dx_BLD.dtype),
        dhead_DV * scale.astype(dhead_DV.dtype),
        None,
        None,
        None,
    )


_sums: Any = jax.custom_vjp(_plain_sums, nondiff_argnums=(5,))
_sums.defvjp(_forward, _backward)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, L, ...] -> [L / (c * chunk), B, c * chunk, ...]: what a scan walks over. A chunk has
    positions of each of the c shards of L, so that all are busy and nothing moves."""

    def split(a: Array) -> Array:
        b, length, *rest = a.shape
        rows, over, *others = _spec(a)
        c = length // _local(a)
        out = _on(a, rows, over, None, None, *others)
        parts = a.reshape(b, c, -1, chunk, *rest, out_sharding=out)
        parts = jnp.moveaxis(parts, 2, 0)
        out = _on(a, None, rows, over, *others)
        return parts.reshape(-1, b, c * chunk, *rest, out_sharding=out)

    return tuple(split(a) for a in arrays)


def _whole(a_nBlD: Array, chunk: int, like: Array) -> Array:
    """The way back of `_chunks`, to the shape and sharding of `like`."""
    n, b, positions, width = a_nBlD.shape
    rows, over, last = _spec(like)
    out = _on(like, None, rows, over, None, last)
    parts = a_nBlD.reshape(n, b, positions // chunk, chunk, width, out_sharding=out)
    return jnp.moveaxis(parts, 0, 2).reshape(like.shape, out_sharding=_on(like, rows, over, last))


def _spec(a: Array) -> tuple[Any, ...]:
    """The mesh axes of each dim."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return spec + (None,) * (a.ndim - len(spec))


def _local(a: Array) -> int:
    """Positions of L on one device. `shard_shape` would not do: it fails where an axis of the mesh
    is manual (jax 0.10.2, op_shardings.py, "Unhandled OpSharding type")."""
    over, mesh = _spec(a)[1] or (), jax.typeof(a).sharding.mesh
    axes = over if isinstance(over, tuple) else (over,)
    return a.shape[1] // math.prod(mesh.shape[axis] for axis in axes)


def _on(a: Array, *spec: Any) -> NamedSharding | None:
    """`spec` on the mesh of `a`; None where it has none."""
    mesh = jax.typeof(a).sharding.mesh
    return None if mesh.empty else NamedSharding(mesh, P(*spec))


def _chunk_sums(
    inputs: tuple[Array, Array, Array],
    head_DV: Array,
    sources_BY: Array | None,
    soft_cap: float | None,
) -> tuple[_Sums, tuple[Array, Array]]:
    """`inputs`: x_BlD, targets_Bl, weights_Bl. Also the logits_BlV and their logsumexp."""
    x_BlD, targets_Bl, weights_Bl = inputs
    with jax.named_scope("head"):
        logits_BlV = jnp.einsum("BlD,DV->BlV", x_BlD, head_DV, preferred_element_type=jnp.float32)
    logits_BlV = soft_capped(logits_BlV, soft_cap)
    lse_Bl = jax.nn.logsumexp(logits_BlV, axis=-1)
    # A masked sum, since V may be sharded and a sharded dim cannot be indexed.
    target_Bl = jnp.where(_is_target(targets_Bl, logits_BlV), logits_BlV, 0).sum(-1)
    nll_Bl = (lse_Bl - target_Bl) * weights_Bl
    z = (lse_Bl**2 * weights_Bl).sum()
    return (nll_Bl.sum(), z, _by_source(nll_Bl, sources_BY)), (logits_BlV, lse_Bl)


def _is_target(targets_Bl: Array, like_BlV: Array) -> Array:
    ids = jax.lax.broadcasted_iota(
        jnp.int32, like_BlV.shape, 2, out_sharding=jax.typeof(like_BlV).sharding
    )
    return ids == targets_Bl[..., None]
