"""Matmul of groups of rows, each group with its own matrix: one interface over three backends.

Sizes stay on the device and nothing waits for them; work follows them to within a block of rows.
Row gradients read the weights as they lie (no transposed copy); sums are float32 throughout.
"""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels import grouped_matmul_tpu, grouped_matmul_triton, grouped_matmul_xla
from jaxmoe.mesh import platform, vary_alike, varying

Array = jax.Array

# Each offers matmul_rows, matmul_weights and swiglu_rows.
PATHS: dict[str, ModuleType] = {
    "xla": grouped_matmul_xla,
    "triton": grouped_matmul_triton,
    "mosaic": grouped_matmul_tpu,
}
_PATH_OF_BACKEND = {"cpu": "xla", "gpu": "triton", "cuda": "triton", "tpu": "mosaic"}


def pick(backend: str | None = None) -> str:
    """The path for a backend ("cpu", "gpu", "cuda", "tpu"; None: that of the mesh); "xla" for any
    that we have no kernel for."""
    return _PATH_OF_BACKEND.get(backend or platform(), "xla")


def grouped_matmul(x_SD: Array, w_EDF: Array, sizes_E: Array, *, path: str) -> Array:
    """y_SF: each row times its group's matrix; zeros for rows beyond the last group.

    On one device, or inside `jax.shard_map`. Where it is checked and w varies over fewer mesh axes
    than x, w's gradient is summed over the others. Lowered for CPU, a kernel runs interpreted, but
    inside a checked `shard_map` as "xla".

    Args:
        x_SD: rows by group, in order of the groups; bfloat16 or float32. Rows beyond the sum of
            the sizes may hold anything: they get zero gradients and give none.
        w_EDF: matrices in the dtype of x.
        sizes_E: int32 rows of each group; 0 is fine, a sum beyond S is undefined.
        path: of PATHS, see `pick`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown path.
    """
    _check(path, x_SD, w_EDF, sizes_E)
    # Outside of the VJP, so that the transpose of the cast does the sums over devices: our rules
    # know nothing of meshes.
    return _matmul(path, *vary_alike(x_SD, w_EDF, sizes_E))


def grouped_swiglu(
    x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array, *, path: str
) -> Array:
    """hidden_SF = silu(x @ wgate) * (x @ wup) by groups, as `grouped_matmul` (SwiGLU:
    arXiv:2002.05202). Keeps only the inputs for the backward pass, which computes gate and up
    again; on "triton" they never leave the chip in the forward pass."""
    _check(path, x_SD, wgate_EDF, sizes_E)
    if wup_EDF.shape != wgate_EDF.shape or wup_EDF.dtype != wgate_EDF.dtype:
        raise ValueError(f"gate and up differ: {wgate_EDF.shape} and {wup_EDF.shape}")
    return _swiglu(path, *vary_alike(x_SD, wgate_EDF, wup_EDF, sizes_E))


def _check(path: str, x_SD: Array, w_EDF: Array, sizes_E: Array) -> None:
    if path not in PATHS:
        raise ValueError(f"path {path!r}: one of {', '.join(PATHS)}")
    fits = x_SD.ndim == 2 and w_EDF.ndim == 3 and x_SD.shape[1] == w_EDF.shape[1]
    if not fits or sizes_E.shape != w_EDF.shape[:1] or 0 in (*x_SD.shape, *w_EDF.shape):
        raise ValueError(
            f"rows {x_SD.shape}, matrices {w_EDF.shape} and sizes {sizes_E.shape}: "
            "expected [S, D], [E, D, F] and [E], none of them 0"
        )
    if x_SD.dtype != w_EDF.dtype or x_SD.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"rows {x_SD.dtype} and matrices {w_EDF.dtype}: one bfloat16 or float32")
    if sizes_E.dtype != jnp.int32:
        raise ValueError(f"sizes are {sizes_E.dtype}, not int32")


def _by_platform(path: str, name: str, *arrays: Array, **options: Any) -> Array:
    """Decided while lowering, so that a program compiled on a CPU host for other chips has the
    kernel in it."""
    of_xla = partial(getattr(grouped_matmul_xla, name), **options)
    if path == "xla":
        return of_xla(*arrays)
    kernel = partial(getattr(PATHS[path], name), **options)
    # Pallas' interpreter fails on data-dependent addresses where avals vary over mesh axes, that
    # is in a checked shard_map ("Primitive dynamic_slice requires varying manual axes to match",
    # jax 0.10.2 and 0.12.0): there a CPU runs the plain loops.
    checked = bool(varying(arrays[0]))
    return jax.lax.platform_dependent(
        *arrays,
        cpu=of_xla if checked else partial(kernel, interpret=True),
        default=partial(kernel, interpret=False),
    )


def _matmul_forward(path: str, x_SD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _by_platform(path, "matmul_rows", x_SD, w_EDF, sizes_E, transposed=False)


def _matmul_fwd(path: str, x_SD: Array, w_EDF: Array, sizes_E: Array) -> tuple[Array, Any]:
    return _matmul_forward(path, x_SD, w_EDF, sizes_E), (x_SD, w_EDF, sizes_E)


def _matmul_bwd(path: str, residuals: Any, dy_SF: Array) -> tuple[Array, Array, None]:
    x_SD, w_EDF, sizes_E = residuals
    dx_SD = _by_platform(path, "matmul_rows", dy_SF, w_EDF, sizes_E, transposed=True)
    return dx_SD, _by_platform(path, "matmul_weights", x_SD, dy_SF, sizes_E), None


_matmul: Any = jax.custom_vjp(_matmul_forward, nondiff_argnums=(0,))
_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _swiglu_forward(
    path: str, x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array
) -> Array:
    return _by_platform(path, "swiglu_rows", x_SD, wgate_EDF, wup_EDF, sizes_E)


def _swiglu_fwd(
    path: str, x_SD: Array, wgate_EDF: Array, wup_EDF: Array, sizes_E: Array
) -> tuple[Array, Any]:
    inputs = x_SD, wgate_EDF, wup_EDF, sizes_E
    return _swiglu_forward(path, *inputs), inputs


def _swiglu_bwd(path: str, residuals: Any, dhidden_SF: Array) -> tuple[Array, Array, Array, None]:
    x_SD, wgate_EDF, wup_EDF, sizes_E = residuals
    gate_SF = _matmul_forward(path, x_SD, wgate_EDF, sizes_E).astype(jnp.float32)
    up_SF = _matmul_forward(path, x_SD, wup_EDF, sizes_E).astype(jnp.float32)
    _, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_SF, up_SF)
    dgate_SF, dup_SF = (d.astype(x_SD.dtype) for d in pull(dhidden_SF.astype(jnp.float32)))
    dx_SD, dwgate_EDF, _ = _matmul_bwd(path, (x_SD, wgate_EDF, sizes_E), dgate_SF)
    more_SD, dwup_EDF, _ = _matmul_bwd(path, (x_SD, wup_EDF, sizes_E), dup_SF)
    return dx_SD + more_SD, dwgate_EDF, dwup_EDF, None


_swiglu: Any = jax.custom_vjp(_swiglu_forward, nondiff_argnums=(0,))
_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
