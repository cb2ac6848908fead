"""Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp

from jaxmoe.spec import Spec

Array = jax.Array


def rms_norm_specs(width: int) -> Spec:
    return Spec(shape=(width,), axes=("norm",), init="ones", cast=False)


@jax.named_scope("norm")
def rms_norm(scale: Array, x: Array, eps: float) -> Array:
    """x / rms(x) * scale over the dims of `scale`, the last ones; float32 inside, the dtype of x
    outside."""
    x32 = x.astype(jnp.float32)
    dims = tuple(range(x.ndim - scale.ndim, x.ndim))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=dims, keepdims=True) + eps)
    return (x32 * inverse * jnp.expand_dims(scale, tuple(range(dims[0])))).astype(x.dtype)
