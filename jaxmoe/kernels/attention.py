"""Causal attention: grouped heads, windows, documents, sinks, soft caps; by the backend's best way.

One interface over cuDNN and splash (kernels/fused.py) and, for all else, plain matmuls: chunks of
queries over the keys that they see, or for long sequences an online softmax (kernels/online.py).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import attention_paths, context
from jaxmoe.attention_paths import Call
from jaxmoe.kernels import fused, ring
from jaxmoe.kernels.chunked import CHUNK, chunked_attention
from jaxmoe.kernels.online import online_attention
from jaxmoe.kernels.ring import ring_attention
from jaxmoe.mesh import platform, vary_alike

Array = jax.Array

# Up to this length chunks, hence at most 8; beyond it the online softmax. Forward + backward on 2
# busy CPU cores, float32, chunks (8 of them) against online, and their temporaries:
#   B=1 N=8 K=4 H=64   L=512    17 ms   30 ms   16 MiB   10 MiB
#                      L=768    55 ms   55 ms   35 MiB   11 MiB
#                      L=1024  191 ms  146 ms   61 MiB   12 MiB
#                      L=4096  1.3 s   0.9 s   892 MiB   32 MiB
#   B=8 N=4 K=2 H=32   L=512    96 ms  150 ms   61 MiB   32 MiB
#                      L=1024  251 ms  134 ms  230 MiB   36 MiB
LONG = 8 * CHUNK


def causal_attention(
    q_BLNH: Array,
    k_BMKH: Array,
    v_BMKU: Array,
    documents_BL: Array | None = None,
    sinks_N: Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    path: str | None = None,
) -> Array:
    """Softmax attention of each position over itself and those before it; on one shard.

    Args:
        q_BLNH: queries; N is a multiple of K, and consecutive N / K heads share a key/value head.
        k_BMKH, v_BMKU: keys and values, M = L; U may differ from H.
        documents_BL: int32; a position sees only those of its own document. None: one document.
        sinks_N: float32; a logit beside a head's scores whose value is zero (gpt-oss,
            arXiv:2508.10925, section 2.2).
        scale: of the scores, usually 1 / sqrt(H).
        window: positions that are seen, the own one included (Mistral 7B, arXiv:2310.06825).
        soft_cap: scores become cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118).
        path: what `pick` gave; None: what it gives for "auto". "splash" off a TPU is interpreted.
            Inside a shard_map it needs `checks_vma(path)` there.

    Returns:
        o_BLNU in the dtype of v. Scores and softmax are float32.
    """
    documents, sinks = documents_BL is not None, sinks_N is not None
    if path is None:
        path = pick("auto", q_BLNH, v_BMKU, soft_cap, documents=documents, sinks=sinks)
    # Multi-query keys and sinks are the same on some shards, but their gradients are not: made
    # varying here, they get their sums over shards from autodiff; kernels' own rules add none.
    q, k, v, ids, sinks_N = _alike((q_BLNH, k_BMKH, v_BMKU, documents_BL, sinks_N))
    if path == "cudnn":
        return fused.cudnn(q.astype(k.dtype), k, v, scale=scale, window=window)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if path == "splash":
        interpret = platform() != "tpu"
        return fused.splash(q.astype(k.dtype), k, v, ids, sinks_N, **options, interpret=interpret)
    return _matmuls(q, k, v, ids, sinks_N, **options)


def context_attention(
    q_blnH: Array,
    k_blkH: Array,
    v_blkU: Array,
    documents_bl: Array | None = None,
    sinks_n: Array | None = None,
    *,
    wish: str = "auto",
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """As `causal_attention`, where each shard of the `context` axis has its part of the positions
    (context.py); inside of a shard_map.

    Args:
        wish: `model.context_attention`.
    """
    q, k, v, ids, sinks = _alike((q_blnH, k_blkH, v_blkU, documents_bl, sinks_n))
    c = jax.lax.axis_size(context.AXIS)
    way = ring.pick(
        wish,
        c,
        window,
        heads=(q.shape[2], k.shape[2]),
        length=k.shape[1],
        bytes_=c * (k.size + v.size) * (k.dtype.itemsize + 4),
    )
    return _matmuls(q, k, v, ids, sinks, scale=scale, way=way, window=window, soft_cap=soft_cap)


def pick(
    wish: str, q: Array, v: Array, soft_cap: float | None, *, documents: bool, sinks: bool
) -> str:
    """The path for these queries and values; `wish` is `model.attention_path`.

    Raises:
        UserError: it is another than "auto" and cannot be had.
    """
    call = Call(
        platform=platform(),
        dtype=v.dtype.name,
        width=max(q.shape[-1], v.shape[-1]),
        soft_cap=soft_cap is not None,
        sinks=sinks,
        documents=documents,
        context=context.shards() > 1,
        hopper=_hopper(),
    )
    return attention_paths.pick(wish, call)


def checks_vma(path: str) -> bool:
    """Whether a shard_map around this path can check over which axes its results vary."""
    return path != "splash"


def _hopper() -> bool:
    """JAX asks the GPU that is here, also when it compiles for another."""
    if jax.default_backend() != "gpu":
        return False
    device: Any = jax.local_devices()[0]
    return float(device.compute_capability) >= 9


def _alike(arrays: Any) -> Any:
    """All varying over the mesh axes that any of them varies over."""
    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, vary_alike(*leaves))


def _matmuls(
    q_blnH: Array,
    k_bmkH: Array,
    v_bmkU: Array,
    documents_bl: Array | None,
    sinks_n: Array | None,
    *,
    scale: float,
    way: str | None = None,
    **masks: Any,
) -> Array:
    """One batch dim Z = B * K and two matrix dims: the only layout that XLA CPU hands to a fast
    matmul. The heads of a group, G = N / K, share keys and values. `way`: of ring.py, where the
    sequence is sharded."""
    b, length, n, _ = q_blnH.shape
    k = k_bmkH.shape[2]
    q_blkGH = (q_blnH * scale).reshape(b, length, k, n // k, -1)
    q_ZlGH = _heads_first(q_blkGH).reshape(b * k, length, n // k, -1)
    k_ZmH = _heads_first(k_bmkH).reshape(b * k, length, -1)
    v_ZmU = _heads_first(v_bmkU).reshape(b * k, length, -1)
    documents_Zl = None if documents_bl is None else jnp.repeat(documents_bl, k, axis=0)
    sinks_ZG = None if sinks_n is None else jnp.tile(sinks_n.reshape(k, n // k), (b, 1))
    if way is None and length <= LONG:
        o_ZlGU = chunked_attention(q_ZlGH, k_ZmH, v_ZmU, documents_Zl, sinks_ZG, **masks)
    else:
        attend = online_attention if way is None else partial(ring_attention, way=way)
        q_ZGlH = jnp.moveaxis(q_ZlGH, 1, 2)
        o_ZGlU = attend(q_ZGlH, k_ZmH, v_ZmU, documents_Zl, sinks_ZG, **masks)
        o_ZlGU = jnp.moveaxis(o_ZGlU, 1, 2)
    o_bklGU = o_ZlGU.reshape(b, k, length, n // k, -1)
    return _heads_first(o_bklGU).reshape(b, length, n, -1)


def _heads_first(x: Array) -> Array:
    return jnp.moveaxis(x, 1, 2)
