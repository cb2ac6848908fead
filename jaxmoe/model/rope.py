"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rope(x_BLNH: Array, positions_L: Array, theta: float) -> Array:
    """Turns each pair (h, h + H/2) by position * theta^(-2h/H); float32 inside."""
    half = x_BLNH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_Lh = positions_L.astype(jnp.float32)[:, None] * frequency_h[None, :]
    cos_Lh, sin_Lh = jnp.cos(angle_Lh)[None, :, None, :], jnp.sin(angle_Lh)[None, :, None, :]
    x1_BLNh, x2_BLNh = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = (x1_BLNh * cos_Lh - x2_BLNh * sin_Lh, x2_BLNh * cos_Lh + x1_BLNh * sin_Lh)
    return jnp.concatenate(turned, axis=-1).astype(x_BLNH.dtype)
