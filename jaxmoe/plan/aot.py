"""The whole train step through the compiler of chips that are not here: what it needs and sends.

Nothing is estimated: the program is the one that would run (run/step.py with the options of
run/xla.py), and memory, collectives and arrays are read off it.
"""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from rich.console import Group
from rich.table import Table

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.config_check import check
from jaxmoe.model.cost import cost
from jaxmoe.plan import hlo, topologies
from jaxmoe.plan.collectives import Row, collectives
from jaxmoe.run import xla
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import abstract_batch, train_step

GIB = 2**30
LARGEST = 10  # arrays that a report names


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device, as the compiler laid them out.

    Attributes:
        arguments: the state and the batch.
        outputs: the new state and the metrics.
        aliased: of the outputs, what takes the place of arguments.
        temporaries: all that lives only during the step, gaps included.
        code: of the program.
        peak: the most that is in use at one time, by the compiler's own count.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """What must be free on a device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Large:
    array: str  # such as bf16[8192,12288]
    op: str  # that makes it first
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """JSON-able by dataclasses.asdict.

    Attributes:
        target: as the user wrote it.
        mesh: size of each axis.
        hbm: bytes of a device.
        fits: the compiler did not refuse, and `memory.total` is at most `hbm`.
        refusal: what the compiler said where the program does not fit; memory is None then, and
            the rest that is read off the program is empty.
        model_flops: of a device and step, as jaxmoe.model.cost counts (no recomputation).
        compiler_flops: by XLA's count, where a loop's body counts once and a kernel not at all.
        host_bytes: the most that this process has had in memory so far.
        blow_ups: arrays of tokens x experts x ff: experts computed for tokens that did not choose
            them. Must be empty.
        options_left_out: compiler options of run/xla.py that this compiler does not know.
    """

    target: str
    n_devices: int
    mesh: dict[str, int]
    tokens_per_step: int
    hbm: int
    fits: bool
    refusal: str | None
    memory: Memory | None
    model_flops: int
    compiler_flops: float
    lower_seconds: float
    compile_seconds: float
    host_bytes: int
    collectives: tuple[Row, ...]
    largest: tuple[Large, ...]
    blow_ups: tuple[Large, ...]
    options_left_out: tuple[str, ...]


def compile_report(config: Config, target_text: str) -> CompileReport:
    """Lowers and compiles the train step of `config` for a target (plan/topologies.py).

    On a machine whose own backend is another (or whose libtpu finds no TPU), set jax_platforms to
    "cpu" before.

    Raises:
        UserError: a target, mesh or config that cannot be; a compiler that is not installed.
    """
    target = topologies.parse(target_text)
    check(config)
    mesh = mesh_lib.over(config.mesh, topologies.devices(target))
    started = time.perf_counter()
    lowered = lower(config, mesh)
    lowered_at = time.perf_counter()
    refusal, compiled, left_out = None, None, []
    try:
        with _no_cache():
            compiled, left_out = xla.compile_with_options(lowered, target.backend)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).strip().splitlines()[0]
    seconds = time.perf_counter() - lowered_at
    memory = _memory(compiled) if compiled else None
    flops_of_sequence = cost(config.model, config.train.seq_len).flops_per_sequence
    return CompileReport(
        target=target_text,
        n_devices=target.n_devices,
        mesh=dict(mesh.shape),
        tokens_per_step=config.tokens_per_step,
        hbm=target.hbm,
        fits=memory is not None and memory.total <= target.hbm,
        refusal=refusal,
        memory=memory,
        model_flops=flops_of_sequence * config.train.batch_size // target.n_devices,
        compiler_flops=_flops(compiled) if compiled else 0.0,
        lower_seconds=lowered_at - started,
        compile_seconds=seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux: KiB
        **_read(compiled.as_text(), config, mesh) if compiled else _NOTHING,
        options_left_out=tuple(left_out),
    )


@contextmanager
def _no_cache() -> Iterator[None]:
    """A program for chips that are not here can be written to JAX's cache, but not read."""
    known: Any = jax.config
    enabled = known.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


_NOTHING: dict[str, Any] = {"collectives": (), "largest": (), "blow_ups": ()}


def lower(config: Config, mesh: Mesh) -> Any:
    """The train step for a mesh of devices that may not be here.

    Raises:
        UserError: a batch or a parameter that does not divide over the mesh.
    """
    with jax.set_mesh(mesh):
        return train_step.lower(abstract_state(config, mesh), abstract_batch(config, mesh), config)


def _memory(compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=found.peak_memory_in_bytes,
    )


def _flops(compiled: Any) -> float:
    return float((compiled.cost_analysis() or {}).get("flops", 0.0))


def _read(text: str, config: Config, mesh: Mesh) -> dict[str, Any]:
    program = hlo.parse(text)
    return {
        "collectives": tuple(collectives(program, mesh.shape)),
        "largest": tuple(_large(pair) for pair in hlo.largest(program, LARGEST)),
        "blow_ups": tuple(blow_ups(program, config, mesh)),
    }


def blow_ups(program: hlo.Program, config: Config, mesh: Mesh) -> Iterator[Large]:
    """Arrays of tokens x experts x ff, as they lie on one device: of that many elements or more,
    with a dim that ff divides and none that is the model's width, which weights have."""
    m = config.model
    if m.is_dense:
        return
    ways = [mesh.shape[axis] for axis in mesh_lib.BATCH]
    tokens = config.tokens_per_step
    for size in ways:
        tokens //= size
    width = m.d_ff // mesh.shape["model"]
    for array, op in hlo.largest(program):
        if array.elements < tokens * m.n_experts * width:
            continue
        if m.d_model not in array.dims and any(dim % width == 0 for dim in array.dims):
            yield _large((array, op))


def _large(pair: tuple[hlo.Array, str]) -> Large:
    array, op = pair
    return Large(array=str(array), op=op, bytes=array.bytes)


# What a person reads


def render(report: CompileReport) -> Group:
    """Tables for a rich console."""
    parts: list[Any] = [_facts(report)]
    if report.collectives:
        parts.append(_traffic(report))
    if report.largest:
        parts.append(_arrays("Largest arrays of the program", report.largest))
    if report.blow_ups:
        parts.append(_arrays("ARRAYS OF TOKENS x EXPERTS x FF", report.blow_ups))
    return Group(*parts)


def _facts(r: CompileReport) -> Table:
    table = Table(title=r.target, show_header=False, title_justify="left")
    rows = [("mesh", mesh_lib.describe(r.mesh)), ("tokens a step", f"{r.tokens_per_step:,}")]
    if r.refusal:
        # Sizes and all; the code in front and advice behind are for XLA's own developers.
        rows.append(("does not fit", re.sub(r"^[A-Z_]+: ", "", r.refusal)))
    if r.memory:
        m = r.memory
        rows += [
            ("arguments (the state)", _gib(m.arguments)),
            ("outputs not in their place", _gib(m.outputs - m.aliased)),
            ("temporaries", _gib(m.temporaries)),
            ("program", _gib(m.code)),
            ("all of it, of the device's", f"{_gib(m.total)} of {_gib(r.hbm)}"),
            ("peak by the compiler", _gib(m.peak)),
            ("fits", "yes" if r.fits else "NO"),
        ]
    rows += [
        ("model FLOPs of a device", f"{r.model_flops:.3g}"),
        ("compile", f"{r.compile_seconds:.0f} s (lowering {r.lower_seconds:.0f} s)"),
        ("memory of this process", _gib(r.host_bytes)),
    ]
    if r.options_left_out:
        rows.append(("options not known", ", ".join(r.options_left_out)))
    for row in rows:
        table.add_row(*row)
    return table


def _traffic(r: CompileReport) -> Table:
    table = Table(title="Collectives of a step, by device", title_justify="left")
    for name in ("kind", "mesh axes", "dtype"):
        table.add_column(name)
    for name in ("count", "payload", "sent at least"):
        table.add_column(name, justify="right")
    for row in r.collectives:
        axes = " x ".join(row.axes) + (" (part)" if row.partial else "")
        count = f"{row.count:,}" + ("+" if row.unknown else "")
        table.add_row(row.kind, axes, row.dtype, count, _size(row.bytes), _size(row.sent))
    if any(row.unknown for row in r.collectives):
        table.caption = "+: some are in a loop whose length depends on the data, and count once"
    return table


def _arrays(title: str, found: tuple[Large, ...]) -> Table:
    table = Table("array", "made by", title=title, title_justify="left")
    table.add_column("size", justify="right")
    for large in found:
        table.add_row(large.array, large.op, _size(large.bytes))
    return table


def _gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB"


def _size(n: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"
