"""Causal attention: grouped heads, windows, documents, sinks, soft caps; by the backend's best way.

One interface over cuDNN and splash (kernels/fused.py) and, for all else, plain matmuls: chunks of
queries over the keys that they see, or for long sequences an online softmax (kernels/online.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import attention_paths
from jaxmoe.attention_paths import Call
from jaxmoe.kernels import fused
from jaxmoe.kernels.online import online_attention
from jaxmoe.mesh import platform, vary_alike

Array = jax.Array

# Queries a chunk, which are unrolled: a chunk sees only its visible keys, so nearly half of the
# scores are never computed. Measured on 2 CPU cores at L=256 (forward + backward): 13.9 ms against
# 26.8 ms in one piece.
CHUNK = 64

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
    if path == "chunked" and q_BLNH.shape[1] <= LONG:
        masks = {"window": window, "soft_cap": soft_cap}
        return _in_chunks(q_BLNH * scale, k_BMKH, v_BMKU, documents_BL, sinks_N, **masks)
    # Multi-query keys and sinks are the same on some shards, but their gradients are not: made
    # varying here, they get their sums over shards from autodiff; kernels' own rules add none.
    q, k, v, ids, sinks_N = _alike((q_BLNH, k_BMKH, v_BMKU, documents_BL, sinks_N))
    if path == "cudnn":
        return fused.cudnn(q.astype(k.dtype), k, v, scale=scale, window=window)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if path == "splash":
        interpret = platform() != "tpu"
        return fused.splash(q.astype(k.dtype), k, v, ids, sinks_N, **options, interpret=interpret)
    return _online(q, k, v, ids, sinks_N, **options)


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


def _online(
    q_BLNH: Array,
    k_BLKH: Array,
    v_BLKU: Array,
    documents_BL: Array | None,
    sinks_N: Array | None,
    *,
    scale: float,
    **masks: Any,
) -> Array:
    b, length, n, _ = q_BLNH.shape
    flat = _flat(q_BLNH * scale, k_BLKH, v_BLKU, documents_BL, sinks_N)
    o_ZGLU = online_attention(*flat, **masks)
    return jnp.moveaxis(o_ZGLU.reshape(b, n, length, -1), 2, 1)


def _in_chunks(
    q_BLNH: Array,
    k_BMKH: Array,
    v_BMKU: Array,
    documents_BL: Array | None,
    sinks_N: Array | None,
    *,
    window: int | None,
    soft_cap: float | None,
) -> Array:
    """Queries are scaled already."""
    b, length, n, _ = q_BLNH.shape
    q_ZGLH, k_ZMH, v_ZMU, documents_ZL, sinks_ZG = _flat(
        q_BLNH, k_BMKH, v_BMKU, documents_BL, sinks_N
    )
    chunk = min(CHUNK, length)
    parts = []
    for first in range(0, length, chunk):
        stop = min(first + chunk, length)
        start = 0 if window is None else max(0, first - window + 1)
        visible = _visible(first, stop, start, window, documents_ZL)
        q_ZGlH, k_ZmH, v_ZmU = q_ZGLH[:, :, first:stop], k_ZMH[:, start:stop], v_ZMU[:, start:stop]
        parts.append(_attend(q_ZGlH, k_ZmH, v_ZmU, visible, sinks_ZG, soft_cap))
    o_ZGLU = jnp.concatenate(parts, axis=2)
    return jnp.moveaxis(o_ZGLU.reshape(b, n, length, -1), 2, 1)


def _flat(
    q_BLNH: Array, k_BMKH: Array, v_BMKU: Array, documents_BL: Any, sinks_N: Any
) -> tuple[Array, Array, Array, Any, Any]:
    """One batch dim Z = B * K and two matrix dims: the only layout that XLA CPU hands to a fast
    matmul. The groups of a head, G = N / K, come next."""
    b, length, n, _ = q_BLNH.shape
    k = k_BMKH.shape[2]
    q_ZGLH = _heads_first(q_BLNH).reshape(b * k, n // k, length, -1)
    k_ZMH = _heads_first(k_BMKH).reshape(b * k, length, -1)
    v_ZMU = _heads_first(v_BMKU).reshape(b * k, length, -1)
    documents_ZL = None if documents_BL is None else jnp.repeat(documents_BL, k, axis=0)
    sinks_ZG = None if sinks_N is None else jnp.tile(sinks_N.reshape(k, n // k), (b, 1))
    return q_ZGLH, k_ZMH, v_ZMU, documents_ZL, sinks_ZG


def _heads_first(x: Array) -> Array:
    return jnp.moveaxis(x, 1, 2)


def _visible(
    first: int, stop: int, start: int, window: int | None, documents_ZL: Array | None
) -> Array:
    """bool [z, l, m], z = 1 or Z: which of the keys start .. stop the queries first .. stop see."""
    distance_lm = jnp.arange(first, stop)[:, None] - jnp.arange(start, stop)[None, :]
    visible_lm = distance_lm >= 0
    if window is not None:
        visible_lm &= distance_lm < window
    if documents_ZL is None:
        return visible_lm[None]
    return visible_lm[None] & (
        documents_ZL[:, first:stop, None] == documents_ZL[:, None, start:stop]
    )


def _attend(
    q_ZGlH: Array,
    k_ZmH: Array,
    v_ZmU: Array,
    visible_zlm: Array,
    sinks_ZG: Array | None,
    soft_cap: float | None,
) -> Array:
    """A chunk of queries, already scaled, over the keys it may see. Z = B * K."""
    z, g, l, h = q_ZGlH.shape  # noqa: E741
    m = k_ZmH.shape[1]
    q_ZqH = q_ZGlH.astype(k_ZmH.dtype).reshape(z, g * l, h)
    scores_Zqm = jnp.einsum("ZqH,ZmH->Zqm", q_ZqH, k_ZmH, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores_Zqm = soft_cap * jnp.tanh(scores_Zqm / soft_cap)
    scores_ZGlm = jnp.where(visible_zlm[:, None], scores_Zqm.reshape(z, g, l, m), -1e30)
    probs_ZGlm = _softmax(scores_ZGlm, sinks_ZG)
    probs_Zqm = probs_ZGlm.reshape(z, g * l, m).astype(v_ZmU.dtype)
    return jnp.einsum("Zqm,ZmU->ZqU", probs_Zqm, v_ZmU).reshape(z, g, l, -1)


def _softmax(scores_ZGlm: Array, sinks_ZG: Array | None) -> Array:
    if sinks_ZG is None:
        return jax.nn.softmax(scores_ZGlm, axis=-1)
    sinks_ZG11 = sinks_ZG.astype(jnp.float32)[..., None, None]
    top_ZGl1 = jnp.maximum(scores_ZGlm.max(-1, keepdims=True), sinks_ZG11)
    top_ZGl1 = jax.lax.stop_gradient(top_ZGl1)
    powers_ZGlm = jnp.exp(scores_ZGlm - top_ZGl1)
    total_ZGl1 = powers_ZGlm.sum(-1, keepdims=True) + jnp.exp(sinks_ZG11 - top_ZGl1)
    return powers_ZGlm / total_ZGl1
