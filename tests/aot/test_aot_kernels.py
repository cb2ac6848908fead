"""The grouped matmuls through the compilers of H100 and TPU v5p: they compile, and stay small."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import absent
import jax
import jax.numpy as jnp
import meshes
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, pick

pytestmark = pytest.mark.aot

TARGETS = {"h100:1x8": "gpu", "tpu:v5p:2x2x2": "tpu"}
T, D, F, E = 8192, 2048, 1024, 64


def both_ways(function: Callable[..., jax.Array], n: int) -> Callable[..., Any]:
    """(inputs..., sizes, dy) -> value and gradients of the n inputs."""

    def run(*arguments: Any) -> Any:
        *inputs, sizes_E, dy = arguments
        y, pull = jax.vjp(lambda *inputs: function(*inputs, sizes_E), *inputs)
        return y, *pull(dy)

    run.__name__ = f"both_ways_{n}"
    return run


def lower(function: Any, mesh: Mesh, shapes: Any, specs: Any) -> Any:
    """shapes: pairs of shape and dtype."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def kernels(compiled: Any) -> Counter[str]:
    """Calls of Pallas kernels in the program, by compiler."""
    target = r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|triton_kernel_call\w*)"'
    return Counter("tpu" if "tpu" in t else "gpu" for t in re.findall(target, meshes.hlo(compiled)))


def largest(compiled: Any) -> int:
    """Elements of the largest tensor anywhere in the program, fusions' insides included."""
    dims = re.findall(r"\b(?:pred|[bsuf]\w*\d)\[([\d,]+)\]", meshes.hlo(compiled))
    return max(math.prod(map(int, each.split(","))) for each in dims)


def shapes_of(n: int, d: int, f: int, dtype: Any) -> list[Any]:
    """For `both_ways` of n - 1 matrices."""
    matrices = [((E, d, f), dtype)] * (n - 1)
    return [((T, d), dtype), *matrices, ((E,), jnp.int32), ((T, f), dtype)]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("d", "f"), [(2048, 1024), (2880, 2880)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_matmul_and_its_gradients(kind: str, d: int, f: int, dtype: Any) -> None:
    """Three kernels, no tensor larger than the weights (a dense layer's [T, E * F] is four times
    as large) and next to no memory but the results."""
    mesh = absent.mesh(kind, data=1)
    backend = TARGETS[kind]
    function = both_ways(lambda *a: grouped_matmul(*a, path=pick(backend)), 2)
    compiled = lower(function, mesh, shapes_of(2, d, f, dtype), [P()] * 4)
    assert kernels(compiled) == {backend: 3}
    assert largest(compiled) == E * d * f < T * E * f
    # Where a dim does not fill its lanes (multiples of 128), XLA for TPU lays the rows out anew.
    bytes_of_rows = T * (d + f) * jnp.dtype(dtype).itemsize
    most = 1 << 20 if d % 128 == 0 or backend == "gpu" else 2 * bytes_of_rows
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize("kind", TARGETS)
def test_swiglu_and_its_gradients(kind: str) -> None:
    """One kernel forward on GPU, two on TPU; backward gate and up again, then both gradients of
    both. Beside the results there are gate, up and their gradients, no more."""
    backend = TARGETS[kind]
    function = both_ways(lambda *a: grouped_swiglu(*a, path=pick(backend)), 3)
    shapes = shapes_of(3, D, F, jnp.bfloat16)
    compiled = lower(function, absent.mesh(kind, data=1), shapes, [P()] * 5)
    assert kernels(compiled) == {backend: 1 + 2 + 4 if backend == "gpu" else 2 + 2 + 4}
    assert largest(compiled) == E * D * F
    assert compiled.memory_analysis().temp_size_in_bytes < 4.1 * (T * F * 2)


@pytest.mark.parametrize("kind", TARGETS)
def test_kernels_in_a_checked_shard_map(kind: str) -> None:
    """Rows over eight devices, matrices over two of them: a device has its own kernels, and the
    matrices' gradient is what is summed."""
    mesh, backend = absent.mesh(kind, data=4, expert=2), TARGETS[kind]
    rows, matrices = P(("data", "expert")), P("expert")
    local = both_ways(lambda *a: grouped_matmul(*a, path=pick(backend)), 2)
    mapped = jax.shard_map(
        local,
        in_specs=(rows, matrices, rows, rows),
        out_specs=(rows, rows, matrices),
    )
    bfloat16 = jnp.bfloat16
    sizes = ((8 * E // 2,), jnp.int32)  # each device's own
    shapes = [((8 * T, D), bfloat16), ((E, D, F), bfloat16), sizes, ((8 * T, F), bfloat16)]
    compiled = lower(mapped, mesh, shapes, [rows, matrices, rows, rows])
    assert kernels(compiled) == {backend: 3}
    assert largest(compiled) == E // 2 * D * F
    assert re.search(r"all-reduce|reduce-scatter", meshes.hlo(compiled))
