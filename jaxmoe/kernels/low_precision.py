"""Matmuls with weights, plain or with float8 operands.

float8 is scaled by the largest value of each row of what is contracted (qwix does the scaling and
rounding): e4m3 for activations and weights, e5m2, of wider range, for gradients (Micikevicius et
al., arXiv:2209.05433, section 3). Products add up in float32; nothing else changes: parameters,
residual stream, norms, router, attention scores and loss keep their dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.errors import UserError
from jaxmoe.mesh import vary_alike, varying

Array = jax.Array

_Operand = tuple[Array, Any]  # and the float8 dtype it is rounded to

VALUE, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


def einsum(spec: str, x: Array, w: Array, matmul: str, out_sharding: Any = None) -> Array:
    """jnp.einsum of two operands, in the dtype of x.

    Args:
        matmul: "plain", or "float8" for forward and both gradients.

    Raises:
        UserError: qwix is not installed.
    """
    if matmul == "plain":
        return jnp.einsum(spec, x, w, out_sharding=out_sharding)
    return _float8(spec, out_sharding, *vary_alike(x, w))


def _forward(spec: str, out_sharding: Any, x: Array, w: Array) -> Array:
    return _product(spec, (x, VALUE), (w, VALUE), x.dtype, out_sharding)


_float8: Any = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))


def _float8_fwd(spec: str, out_sharding: Any, x: Array, w: Array) -> tuple[Array, Any]:
    return _forward(spec, out_sharding, x, w), (x, w)


def _float8_bwd(spec: str, _: Any, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, ...]:
    """As if nothing had been rounded, but for the operands of these two products."""
    x, w = residuals
    operands, of_y = spec.split("->")
    of_x, of_w = operands.split(",")
    into_x, into_w = f"{of_y},{of_w}->{of_x}", f"{of_x},{of_y}->{of_w}"
    dx = _product(into_x, (dy, GRADIENT), (w, VALUE), x.dtype, _sharding(x))
    dw = _product(into_w, (x, VALUE), (dy, GRADIENT), w.dtype, _sharding(w))
    return dx, dw


_float8.defvjp(_float8_fwd, _float8_bwd)


def _product(spec: str, a: _Operand, b: _Operand, dtype: Any, out_sharding: Any) -> Array:
    operands, out = spec.split("->")
    letters_a, letters_b = operands.split(",")
    value_a, scale_a = _scaled(a, letters_a, out)
    value_b, scale_b = _scaled(b, letters_b, out)
    y = jnp.einsum(
        spec, value_a, value_b, preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
    return (y * scale_a * scale_b).astype(dtype)


def _scaled(operand: _Operand, letters: str, out: str) -> tuple[Array, Array]:
    """float8 values, and float32 scales with the dims of `out`: 1 where the operand has none."""
    a, qtype = operand
    kept = [letter for letter in letters if letter in out]
    channels = [letters.index(letter) for letter in kept]
    # float32 before, or scales would be rounded to the dtype of `a`.
    a = a.astype(jnp.float32)
    quantized = _qwix().quantize(a, qtype, channelwise_axes=channels)
    summed = tuple(i for i in range(a.ndim) if i not in channels)
    scale = jnp.squeeze(quantized.scale, summed)
    scale = jnp.transpose(scale, sorted(range(len(kept)), key=lambda i: out.index(kept[i])))
    absent = tuple(i for i, letter in enumerate(out) if letter not in kept)
    return quantized.qvalue, jnp.expand_dims(scale, absent)


def _sharding(a: Array) -> Any:
    """Of a result like `a`; inside of shard_map there is nothing to say."""
    return None if varying(a) else jax.typeof(a).sharding


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            f"model.matmul=float8 needs qwix ({error}): pip install 'jaxmoe[float8]'"
        ) from None
    return qwix
