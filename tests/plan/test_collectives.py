"""Collectives of small programs on eight emulated devices: axes, counts and bytes, exactly."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import hlo, on

from jaxmoe.plan import hlo as hlo_lib
from jaxmoe.plan.collectives import SLICES, Row, collectives, replica_groups

SHAPE = (8, 12)  # float32; every program starts with this array, whole or in parts
BYTES = 8 * 12 * 4


def sent(text: str, shape: Mapping[str, int]) -> list[Row]:
    return collectives(hlo_lib.parse(text), shape)


def rows_of(body: Any, spec_in: P, spec_out: P, dtype: Any = jnp.float32, **axes: int) -> list[Row]:
    mesh = on(**axes)
    mapped: Any = jax.shard_map(
        body, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False
    )
    x = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=NamedSharding(mesh, spec_in))
    return sent(hlo(jax.jit(mapped).lower(x).compile()), mesh.shape)


def one(body: Any, spec_in: P, spec_out: P, dtype: Any = jnp.float32, **axes: int) -> Row:
    rows = rows_of(body, spec_in, spec_out, dtype, **axes)
    assert len(rows) == 1, rows
    return rows[0]


def same(**want: Any) -> Row:
    return Row(**{"dtype": "f32", "count": 1, **want})


def test_psum_over_model() -> None:
    got = one(lambda x: jax.lax.psum(x, "model"), P(), P(), data=4, model=2)
    # A ring of two: half of it there, then half of the sum.
    assert got == same(kind="all-reduce", axes=("model",), bytes=BYTES, sent=BYTES)


def test_psum_over_two_axes_that_are_no_neighbours() -> None:
    body = lambda x: jax.lax.psum(x, ("replica", "model"))  # noqa: E731
    got = one(body, P(), P(), replica=2, data=2, model=2)
    sent = 2 * BYTES * 3 // 4
    assert got == same(kind="all-reduce", axes=("replica", "model"), bytes=BYTES, sent=sent)


def test_all_gather_over_data() -> None:
    body = lambda x: jax.lax.all_gather(x, "data", tiled=True)  # noqa: E731
    got = one(body, P("data"), P(), data=4, expert=2)
    assert got == same(kind="all-gather", axes=("data",), bytes=BYTES, sent=BYTES * 3 // 4)


def test_reduce_scatter_over_data() -> None:
    """Its result is a part of what goes in, and what goes in is what counts."""
    body = lambda x: jax.lax.psum_scatter(x, "data", tiled=True)  # noqa: E731
    got = one(body, P(), P("data"), data=4, model=2)
    assert got == same(kind="reduce-scatter", axes=("data",), bytes=BYTES, sent=BYTES * 3 // 4)


def test_ppermute_over_stage() -> None:
    ring = [(i, (i + 1) % 4) for i in range(4)]
    got = one(lambda x: jax.lax.ppermute(x, "stage", ring), P(), P(), stage=4, data=2)
    assert got == same(kind="collective-permute", axes=("stage",), bytes=BYTES, sent=BYTES)


def test_all_to_all_over_expert() -> None:
    body = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    got = one(body, P(), P(), jnp.bfloat16, data=2, expert=4)
    # XLA CPU has it in float32 where the width of the type is not its own; bytes say which.
    size = BYTES // 2 if got.dtype == "bf16" else BYTES
    want = same(kind="all-to-all", axes=("expert",), bytes=size, sent=size * 3 // 4)
    assert got == Row(**{**vars(want), "dtype": got.dtype})


def test_a_scan_counts_as_often_as_it_runs() -> None:
    def body(x: jax.Array) -> jax.Array:
        def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.psum(jnp.sin(carry), "expert"), None

        return jax.lax.scan(step, jax.lax.psum(x, "data"), None, length=5)[0]

    rows = rows_of(body, P(), P(), data=2, expert=4)
    sent = 2 * BYTES * 3 // 4
    assert rows == [
        same(kind="all-reduce", axes=("expert",), count=5, bytes=5 * BYTES, sent=5 * sent),
        same(kind="all-reduce", axes=("data",), bytes=BYTES, sent=BYTES),
    ]


def test_scans_multiply_and_a_loop_of_unknown_length_says_so() -> None:
    def inner(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.psum(jnp.sin(carry), "data"), None

    def outer(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, carry, None, length=3)[0], None

    nested = lambda x: jax.lax.scan(outer, x, None, length=7)[0]  # noqa: E731
    assert one(nested, P(), P(), data=2).count == 21

    def until_small(x: jax.Array) -> jax.Array:
        small = lambda x: x.sum() > 1  # noqa: E731
        return jax.lax.while_loop(small, lambda x: jax.lax.psum(x, "data") / 5, x)

    got = one(until_small, P(), P(), data=2)
    assert (got.count, got.unknown) == (1, True)


def test_of_a_switch_the_branch_that_sends_least() -> None:
    def body(x: jax.Array) -> jax.Array:
        small = lambda x: x + jax.lax.psum(x[:2], "expert").sum()  # noqa: E731
        large = lambda x: jax.lax.psum(jnp.cos(x), "expert")  # noqa: E731
        return jax.lax.switch(x[0, 0].astype(jnp.int32), [large, small], x)

    assert one(body, P(), P(), expert=2).bytes == BYTES // 4


def test_what_the_compiler_makes_of_explicit_sharding() -> None:
    """Groups that no one wrote: a contraction over `data` and `model`, and a gather over both."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"), (AxisType.Explicit,) * 3)
    x = jax.ShapeDtypeStruct(
        SHAPE, jnp.float32, sharding=NamedSharding(mesh, P(None, ("data", "model")))
    )

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.reshard(x, P(None, None))
        return jnp.einsum("ab,cb->ac", x, x, out_sharding=P(None, None)), whole

    with jax.set_mesh(mesh):
        rows = sent(hlo(jax.jit(both).lower(x).compile()), mesh.shape)
    axes = ("data", "model")
    reduced, gathered = 8 * 8 * 4, BYTES
    assert rows == [
        same(kind="all-reduce", axes=axes, bytes=reduced, sent=2 * reduced * 3 // 4),
        same(kind="all-gather", axes=axes, bytes=gathered, sent=gathered * 3 // 4),
    ]


# Forms that other compilers write (libtpu 0.0.42 those with a mesh), all of them the groups over
# the first and last axis of 2 x 2 x 2.
@pytest.mark.parametrize(
    "form",
    [
        "{{0,1,4,5},{2,3,6,7}}",
        "[2,4]<=[2,2,2]T(1,0,2)",
        "mesh['a'=2,'b'=2,'c'=2] {'a','c'}",
        "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}",
        "mesh['x'=8] {'x':(1)2,'x':(4)2}",
        "mesh['x'=8], device_ids=(0,2,1,3,4,6,5,7) {'x':(1)4}",
    ],
)
def test_forms_of_groups(form: str) -> None:
    groups = replica_groups(f"all-reduce(%x), replica_groups={form}, to_apply=%add", 8)
    assert sorted(sorted(g) for g in groups.tolist()) == [[0, 1, 4, 5], [2, 3, 6, 7]]


TEXT = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  ROOT %r = (s32[], f32[4]) tuple(%i, %g)
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(24), metadata={op_name="a"}
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%wrapped (a: bf16[2,6]) -> bf16[6] {
  %a = bf16[2,6] parameter(0)
  ROOT %rs = bf16[6]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%loop (p: (s32[], bf16[12])) -> (s32[], bf16[12]) {
  %s = ((bf16[2,6]), bf16[6]) async-start(%a), calls=%wrapped
  %d = bf16[6]{0} async-done(%s)
  %ag = (bf16[6]{0}, bf16[12]{0:T(8,128)}) all-gather-start(%d), replica_groups=[2,2]<=[2,2]T(1,0)
not an instruction: an attribute's own line break
  %cp = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  %sc = ((bf16[12]{0}, bf16[4]), (bf16[3], bf16[1])) reduce-scatter-start(%a), replica_groups={}
  %aa = ((f32[4]{0}), f32[4]{0}, u32[]) all-to-all-start(%f), replica_groups=[2,2]<=[4]
  %ra = f32[7,3]{1,0} ragged-all-to-all(%a, %b, %c, %d, %e, %f), replica_groups={{0,1},{2,3}}
  %own = f32[4] all-reduce(%f), replica_groups={{0},{1},{2},{3}}, to_apply=%x
}

%all-reduce-scatter.3 (a: bf16[9]) -> bf16[3] {
  %ar = bf16[10]{0} all-reduce(%a), replica_groups={{0,2},{1,3}}, to_apply=%x
  ROOT %kept = bf16[5] dynamic-slice(%ar, %at), dynamic_slice_sizes={5}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %ars = bf16[5]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %two = s32[]{:T(128)} constant(2)
  %begin = s32[] copy(%two)
  %t = (s32[], bf16[12]) tuple(%begin, /*index=1*/%y), metadata={op_name="(x)"}
  %w = (s32[], bf16[12]) while(%t), condition=%cond, body=%loop
  %send.1 = (bf16[3,5]{1,0}, u32[], token[]) send(%y, %after), handler="xla_megascale_runtime"
  %all = f32[4]{0} all-reduce-start(%f), replica_groups={}, to_apply=%x
}
"""


def test_started_wrapped_and_looped() -> None:
    """What other backends write: -start forms, a collective in a computation of its own, and a loop
    whose length stands in its condition only."""
    rows = sent(TEXT, {"data": 2, "model": 2})
    found = {(r.kind, r.axes, r.dtype): (r.count, r.bytes, r.sent) for r in rows}
    n = 24 - 2  # the compiler peeled two off
    assert found == {
        ("reduce-scatter", ("model",), "bf16"): (n, n * 24, n * 12),
        ("all-gather", ("data",), "bf16"): (n, n * 24, n * 12),
        ("reduce-scatter", ("data",), "bf16"): (1, 20, 10),
        ("send", (SLICES,), "bf16"): (1, 30, 30),
        ("collective-permute", ("model",), "f32"): (n, n * 16, n * 16),
        ("reduce-scatter", ("data", "model"), "bf16"): (n, n * 32, n * 24),
        ("all-to-all", ("model",), "f32"): (n, n * 16, n * 8),
        ("ragged-all-to-all", ("model",), "f32"): (n, n * 84, n * 42),
        ("all-reduce", ("data", "model"), "f32"): (1, 16, 24),
    }
    assert not any(r.partial or r.unknown for r in rows)
    some = sent(TEXT.replace("replica_groups={}", "replica_groups={{0,3},{1,2}}"), {"x": 4})
    (part,) = [r for r in some if r.kind == "all-reduce"]
    assert part.partial and part.axes == ("x",)


def test_largest_arrays_are_those_that_live() -> None:
    def body(x: jax.Array) -> jax.Array:
        return jnp.sort(jnp.sin(x)[:, :, None] * jnp.cos(x)[:, None], axis=0).sum(0)

    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    program = hlo_lib.parse(hlo(jax.jit(body).lower(x).compile()))
    (array, _), *_ = hlo_lib.largest(program)
    assert array.dims == (8, 12, 12) and array.bytes == 8 * 12 * 12 * 4
    assert len(list(hlo_lib.largest(program, 1))) == 1
    assert [str(a) for a in hlo_lib.arrays("(f8e4m3fn[3], pred[], s4[5])")] == [
        "f8e4m3fn[3]",
        "pred[]",
        "s4[5]",
    ]
    assert [a.bytes for a in hlo_lib.arrays("(f8e4m3fn[3], pred[], s4[5])")] == [3, 1, 3]
