"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rope(x_BLnH: Array, positions_L: Array, theta: float) -> Array:
    """Turns each pair (h, h + H/2) by position * theta^(-2h/H); float32 inside. n: any heads."""
    half = x_BLnH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_Lh = positions_L.astype(jnp.float32)[:, None] * frequency_h[None, :]
    cos, sin = jnp.cos(angle_Lh)[None, :, None, :], jnp.sin(angle_Lh)[None, :, None, :]
    x1_BLnh, x2_BLnh = jnp.split(x_BLnH.astype(jnp.float32), 2, axis=-1)
    turned = (x1_BLnh * cos - x2_BLnh * sin, x2_BLnh * cos + x1_BLnh * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BLnH.dtype)
