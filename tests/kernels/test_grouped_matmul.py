"""Grouped matmuls on every path equal each group's own plain product: values and all gradients.

The kernels for GPU and TPU run interpreted; tests/aot has their real compilers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from reference import assert_close

from jaxmoe.kernels import grouped_matmul_tpu, grouped_matmul_triton, grouped_matmul_xla
from jaxmoe.kernels.grouped_matmul import PATHS, grouped_matmul, grouped_swiglu, pick
from jaxmoe.kernels.grouped_tiles import Tiles, row_tiles, visits

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8}  # the latter is what one rounding costs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a few rows and columns make several blocks, in all dims, with ragged ends."""
    small = grouped_matmul_triton.Blocks(m=16, n=32, k=16, warps=4, stages=2)
    for dtype in TOLERANCE:
        monkeypatch.setitem(grouped_matmul_triton.ROW_BLOCKS, dtype, ((0, small),))
        monkeypatch.setitem(grouped_matmul_triton.WEIGHT_BLOCKS, dtype, small)
        monkeypatch.setitem(grouped_matmul_tpu.MAX_SIDE, dtype, 128)
    monkeypatch.setattr(grouped_matmul_xla, "BLOCK", 16)
    for name, size in (("MIN_ROWS", 16), ("MAX_ROWS", 16)):
        monkeypatch.setattr(grouped_matmul_tpu, name, size)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plainly(x: Any, w: Any, sizes: Any, dy: Any) -> tuple[np.ndarray, ...]:
    """y, dx, dw in float64, every group by itself; what is no group's is zero."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own], dx[own], dw[e] = x[own] @ w[e], dy[own] @ w[e].T, x[own].T @ dy[own]
        start += size
    return y, dx, dw


@partial(jax.jit, static_argnames="path")
def run(x: Any, w: Any, sizes: Any, dy: Any, *, path: str) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, path=path), x, w)
    return y, *pull(dy)


def check(path: str, sizes: list[int], x: Any, w: Any, dy: Any) -> None:
    dtype, filled = w.dtype, sum(sizes)
    y, dx, dw = plainly(x[:filled], w, sizes, dy[:filled])
    beyond = ((0, len(x) - filled), (0, 0))
    wanted = np.pad(y, beyond), np.pad(dx, beyond), dw
    x, dy = x.at[filled:].set(jnp.nan), dy.at[filled:].set(jnp.nan)  # must not matter
    got = run(x, w, jnp.asarray(sizes, jnp.int32), dy, path=path)
    for part, ours, plain in zip(("y", "dx", "dw"), got, wanted, strict=True):
        assert ours.dtype == dtype
        ours = np.asarray(ours, np.float64)
        if filled:
            assert_close(ours, plain, TOLERANCE[str(dtype)], part)
        assert not ours[plain == 0].any(), part  # exactly


# Eight groups over 97 rows: one compiled program a path for all of these.
SIZES = {
    "ragged": [1, 15, 17, 7, 31, 16, 2, 8],
    "as many tiles and visits as can be": [17, 17, 17, 17, 17, 1, 1, 1],
    "whole blocks": [16, 32, 16, 16, 0, 0, 0, 16],
    "one giant group": [0, 0, 0, 97, 0, 0, 0, 0],
    "empty groups": [0, 5, 0, 0, 59, 32, 1, 0],
    "rows beyond the sum": [5, 0, 20, 0, 9, 0, 0, 0],
    "a block beyond the sum": [0, 0, 0, 0, 0, 0, 0, 80],
    "no rows at all": [0] * 8,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SIZES)
def test_any_sizes(path: str, name: str) -> None:
    x, w, dy = (jnp.asarray(a) for a in (draw(0, 97, 40), draw(1, 8, 40, 72), draw(2, 97, 72)))
    check(path, SIZES[name], x, w, dy)


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted they run one after another, where the last writer of a row wins; on a GPU they
    do not. Backwards, a row that is written twice comes out wrong."""
    in_order = grouped_matmul_triton.row_tiles
    backwards = lambda *a: Tiles(*(v[::-1] for v in in_order(*a)))
    monkeypatch.setattr(grouped_matmul_triton, "row_tiles", backwards)
    x, w, dy = (jnp.asarray(a) for a in (draw(0, 40, 16), draw(1, 3, 16, 16), draw(2, 40, 16)))
    check("triton", [17, 1, 20], x, w, dy)


@pytest.mark.parametrize("seed", range(20))
def test_tiles_and_visits_have_each_row_once(seed: int) -> None:
    """With its group: in tiles that begin at any row, and in aligned blocks."""
    rng = np.random.default_rng(seed)
    rows, e, block = 70, 6, 8
    parts = np.sort(rng.integers(0, rows + 1, e))
    sizes = np.diff(parts, prepend=0) * (rng.random(e) < 0.7)
    group_r = np.repeat(np.arange(e + 1), [*sizes, rows - sizes.sum()])  # e: of no group

    def covered(start: Any, stop: Any, group: Any) -> np.ndarray:
        out = np.zeros((e + 1, rows), int)
        for first, last, g in zip(start, stop, group, strict=True):
            out[g, first:last] += 1
        return out

    wanted = (group_r[None] == np.arange(e + 1)[:, None]).astype(int)
    device = jnp.asarray(sizes, jnp.int32)
    group, start, _, end = (np.asarray(v) for v in row_tiles(device, rows, block))
    np.testing.assert_array_equal(covered(start, np.minimum(end, start + block), group), wanted)
    for empty in (False, True):
        group, at, start, end = (np.asarray(v) for v in visits(device, rows, block, empty=empty))
        start, stop = np.maximum(start, at * block), np.minimum(end, (at + 1) * block)
        mine = wanted * (np.arange(e + 1)[:, None] < e) if empty else wanted
        np.testing.assert_array_equal(covered(start, stop, group), mine)
        # A block and a group stay in the chip's memory from one visit to the next.
        assert (np.diff(group) >= 0).all() and (np.diff(at) >= 0).all()
        assert not empty or set(group) == set(range(e))


# Sizes, S, D, F.
SHAPES = {
    "one row": ([1], 1, 16, 24),
    "several blocks of columns": ([9, 0, 22], 33, 256, 131),
    "64 groups": (np.random.default_rng(0).integers(0, 4, 64).tolist(), 130, 16, 24),
    "256 groups": (np.random.default_rng(1).integers(0, 3, 256).tolist(), 520, 8, 12),
}
# Several blocks of columns are in all sizes above but for "mosaic", whose least side is 128.
ALL_SHAPES = [
    *((path, "one row") for path in PATHS),
    ("xla", "256 groups"),
    ("triton", "64 groups"),
    ("mosaic", "64 groups"),
    ("mosaic", "several blocks of columns"),
]


@pytest.mark.parametrize(("path", "name"), ALL_SHAPES)
def test_any_shapes(path: str, name: str) -> None:
    sizes, s, d, f = SHAPES[name]
    x, w, dy = draw(0, s, d), draw(1, len(sizes), d, f), draw(2, s, f)
    check(path, sizes, *(jnp.asarray(a) for a in (x, w, dy)))


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_is_rounded_once(path: str) -> None:
    """Long sums of positive numbers: any rounding of their parts would show."""
    x, w, dy = np.abs(draw(0, 250, 512)), np.abs(draw(1, 3, 512, 32)), np.abs(draw(2, 250, 32))
    check(path, [240, 0, 7], *(jnp.asarray(a, jnp.bfloat16) for a in (x, w, dy)))


SWIGLU_SIZES = [7, 0, 20]


def plain_swiglu(x: Any, wgate: Any, wup: Any) -> jax.Array:
    parts, start = [], 0
    for e, size in enumerate(SWIGLU_SIZES):
        gate, up = (x[start : start + size] @ v[e] for v in (wgate, wup))
        parts.append(gate / (1 + jnp.exp(-gate)) * up)
        start += size
    return jnp.concatenate([*parts, jnp.zeros((len(x) - start, wgate.shape[2]))])


@pytest.mark.parametrize("path", PATHS)
def test_swiglu(path: str) -> None:
    x, dhidden = jnp.asarray(draw(0, 31, 40)), jnp.asarray(draw(1, 31, 72))
    w = jnp.asarray(draw(2, 3, 40, 72)), jnp.asarray(draw(3, 3, 40, 72))

    def with_gradients(f: Any, dhidden: Any, *inputs: Any) -> Any:
        hidden, pull = jax.vjp(f, *inputs)
        # The backward pass is `grouped_matmul` on every path.
        return (hidden, *pull(dhidden)) if path == "xla" else (hidden,)

    sizes = jnp.asarray(SWIGLU_SIZES, jnp.int32)
    mine = lambda x, wgate, wup: grouped_swiglu(x, wgate, wup, sizes, path=path)
    beyond = slice(sum(SWIGLU_SIZES), None)
    x, dhidden = x.at[beyond].set(jnp.nan), dhidden.at[beyond].set(jnp.nan)
    got = jax.jit(partial(with_gradients, mine))(dhidden, x, *w)
    x, dhidden = x.at[beyond].set(0), dhidden.at[beyond].set(0)
    wanted = jax.jit(partial(with_gradients, plain_swiglu))(dhidden, x, *w)
    names = ("hidden", "dx", "dwgate", "dwup")
    for name, a, b in zip(names[: len(got)], got, wanted, strict=True):
        assert_close(a, b, name=name)
        assert not np.asarray(a)[np.asarray(b) == 0].any(), name


# Checked, a CPU runs the plain loops on every path; the kernels' types are still checked.
CHECKED = [
    ("xla", True),
    *((path, flag) for path in ("triton", "mosaic") for flag in (True, False)),
]


@pytest.mark.parametrize(("path", "checked"), CHECKED)
def test_in_shard_map(path: str, checked: bool) -> None:
    """Rows over both axes, matrices over one of them: a matrix's gradient is summed over the shards
    that share it, and only where shard_map knows which those are."""
    sizes = [[3, 4], [0, 7], [7, 0], [1, 1], [5, 2], [0, 0], [2, 5], [6, 1]]
    x, w, dy = draw(0, 8, 7, 10), draw(1, 2, 2, 10, 12), draw(2, 8, 7, 12)
    mesh = meshes.on(data=4, expert=2)
    rows, matrices = P(("data", "expert")), P("expert")

    def local(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes[0], path=path), x[0], w[0])
        dx, dw = pull(dy[0])
        assert jax.typeof(dw) == jax.typeof(w[0])
        return y[None], dx[None], dw[None]

    with jax.set_mesh(mesh):
        mapped: Any = jax.shard_map(
            local,
            in_specs=(rows, matrices, rows, rows),
            out_specs=(rows, rows, matrices if checked else rows),
            check_vma=checked,
        )
        inputs = x, w, np.asarray(sizes, np.int32), dy
        specs = rows, matrices, rows, rows
        y, dx, dw = jax.jit(mapped)(
            *(meshes.put(mesh, a, spec) for a, spec in zip(inputs, specs, strict=True))
        )
    dw = np.asarray(dw) if checked else np.asarray(dw).reshape(4, *w.shape).sum(0)
    wanted = [plainly(x[i], w[i % 2], sizes[i], dy[i]) for i in range(8)]
    y_wanted, dx_wanted, dw_wanted = (np.stack(parts) for parts in zip(*wanted, strict=True))
    assert_close(y, y_wanted, name="y")
    assert_close(dx, dx_wanted, name="dx")
    assert_close(dw, dw_wanted.reshape(4, *w.shape).sum(0), name="dw")


def test_the_path_follows_the_backend() -> None:
    assert [pick(b) for b in ("cpu", "gpu", "cuda", "tpu")] == ["xla", "triton", "triton", "mosaic"]
    assert pick() == pick("METAL") == "xla"


def test_what_does_not_fit_is_refused() -> None:
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 2], jnp.int32)
    for message, change in {
        "one of xla, triton, mosaic": {"path": "cublas"},
        "expected": {"x_SD": jnp.ones((4, 5))},
        r"sizes \(3,\)": {"sizes_E": jnp.array([1, 2, 1], jnp.int32)},
        "rows bfloat16 and matrices float32": {"x_SD": x.astype(jnp.bfloat16)},
        "sizes are float32": {"sizes_E": jnp.ones(2)},
    }.items():
        good: dict[str, Any] = {"x_SD": x, "w_EDF": w, "sizes_E": sizes, "path": "xla"}
        with pytest.raises(ValueError, match=message):
            grouped_matmul(**(good | change))
    with pytest.raises(ValueError, match="gate and up differ"):
        grouped_swiglu(x, w, w[:, :, :4], sizes, path="xla")
    huge = jax.ShapeDtypeStruct((1 << 28, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"under 2\*\*31 elements"):
        jax.eval_shape(partial(grouped_matmul, path="triton"), huge, jnp.ones((2, 8, 8)), sizes)
