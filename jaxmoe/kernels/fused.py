"""Attention kernels that others ship, behind our conventions: cuDNN's on GPU, splash on TPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.chunked import KEPT

Array = jax.Array

# Splash's blocks, the largest that fits: queries and keys at a time. Keys come in lanes of 128.
BLOCKS = (512, 256, 128)
# A length is padded to whole blocks by at most this share, or by less than the smallest block.
MOST_PADDING = 1 / 8


def cudnn(
    q_BLNH: Array, k_BLKH: Array, v_BLKU: Array, *, scale: float, window: int | None
) -> Array:
    """o_BLNU by cuDNN's flash attention. All bfloat16; widths as `attention_paths` allows."""
    u = v_BLKU.shape[-1]
    # One width for all, a multiple of 8. Zeros change no score, and their outputs are cut off;
    # MLA's values of 128 beside keys of 192 cost a fifth more FLOPs this way.
    width = -(-max(q_BLNH.shape[-1], u) // 8) * 8
    q, k, v = (_padded(a, -1, width) for a in (q_BLNH, k_BLKH, v_BLKU))
    if window is not None and window >= q_BLNH.shape[1]:
        window = None
    # Ours counts the own position, JAX's what lies left of it.
    left = None if window is None else (window - 1, 0)
    o = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
    )
    return o[..., :u]


def splash(
    q_BLNH: Array,
    k_BLKH: Array,
    v_BLKU: Array,
    documents_BL: Array | None,
    sinks_N: Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> Array:
    """o_BLNU by splash attention; `interpret` runs it off a TPU, slowly.

    Its outputs do not say over which mesh axes they vary: the shard_map around it must not ask
    (check_vma=False).
    """
    # Imported here: 0.6 s that only a TPU has a use for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, n = q_BLNH.shape[1:3]
    block, padded = splash_block(length)
    # Keys of the padding lie after all queries, hence are seen by none.
    q, k, v = (jnp.moveaxis(_padded(a, 1, padded), 1, 2) for a in (q_BLNH * scale, k_BLKH, v_BLKU))
    left = None if window is None else window - 1
    mask = masks.MultiHeadMask([masks.LocalMask((padded, padded), (left, 0), 0)] * n)
    kernel = lib.make_splash_mha(
        mask,
        block_sizes=lib.BlockSizes(
            # Two kernels backward: the fused one keeps a dq for each block of keys.
            *(block, block, block),
            *(block, block, block),
            *(block, block),
        ),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=KEPT,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if documents_BL is not None:
        documents = _padded(documents_BL, 1, padded)
        segments = lib.SegmentIds(documents, documents)
    o_BNLU: Any = jax.vmap(partial(kernel, sinks=sinks_N))(q, k, v, segments)
    return jnp.moveaxis(o_BNLU, 2, 1)[:, :length]


def splash_block(length: int) -> tuple[int, int]:
    """The block of splash for a length, and the length that it is padded to."""
    for block in BLOCKS:
        padded = -(-length // block) * block
        if padded <= (1 + MOST_PADDING) * length or block == BLOCKS[-1]:
            return block, padded
    raise AssertionError


def _padded(a: Array, axis: int, size: int) -> Array:
    extra = size - a.shape[axis]
    pads = [(0, 0)] * a.ndim
    pads[axis] = (0, extra)
    return jnp.pad(a, pads) if extra else a
