"""What a traced program holds in memory: its jaxpr is walked, buffers are born and die.

The jaxpr of a step on an explicit mesh has every array's sharding in its type, so that what one
device holds follows without devices and without a compiler. What XLA does to it is modelled by a
few rules: elementwise work is fused into what reads it and has no buffer of its own; operands of
matmuls, sorts, gathers, kernels and collectives have one; loops keep stacked results for their
whole length and what one iteration needs at its highest; a branch needs what its largest needs.
"""

import heapq
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

# Results without a buffer of their own: computed inside of what reads them.
FUSED = frozenset(
    "abs add add_any and argmax broadcast_in_dim ceil clamp convert_element_type copy cos div"
    " dynamic_slice eq erf exp exp2 expand_dims floor ge gt integer_pow iota is_finite le log log1p"
    " logistic lt max min mul ne neg not or pow rem reduce_precision rev round rsqrt select_n"
    " shift_left shift_right_logical sign sin slice split sqrt square sub tanh transpose xor"
    " ge_to le_to lt_to gt_to eq_to random_bits random_unwrap random_wrap threefry2x32"
    " stack unstack axis_index platform_index pad concatenate".split()
)
# The same bytes under another name.
RENAMED = frozenset(
    "reshape squeeze pvary pcast stop_gradient name copy_p optimization_barrier"
    " vary_unreduced_cast mesh_cast sharding_constraint".split()
)
REDUCED = frozenset(
    "reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod argmin cumsum cumlogsumexp"
    " cummax".split()
)
IN_PLACE = frozenset("dynamic_update_slice scatter scatter-add scatter_add".split())
LOOPS = frozenset("scan while cond".split())
# The jaxpr of a called function, by the name of the parameter that has it.
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
HALF = 0.5
MULTI = FUSED - frozenset(
    "broadcast_in_dim iota eq ne lt gt le ge not and or select_n slice split".split()
)


@dataclass(eq=False)
class Value:
    """What a variable stands for: a buffer, or something that is computed from some."""

    size: int
    reads: frozenset[int] = frozenset()
    is_buffer: bool = False
    ours: bool = False  # of an outer level, but to be overwritten: what a loop carries

    @property
    def replaceable(self) -> bool:
        return bool(self.reads) or self.ours


@dataclass(frozen=True, kw_only=True)
class Held:
    """A buffer that is alive at the peak."""

    size: int
    shape: tuple[int, ...]
    dtype: str
    primitive: str
    where: str  # the name stack: jvp(..) forward, transpose(jvp(..)) backward, and named scopes
    inside: bool  # of a loop or branch: one iteration's


@dataclass
class Peak:
    size: int
    held: list[Held] = field(default_factory=list)


@dataclass
class _Buffer:
    size: int
    born: float
    last: float
    about: Held


class Walk:
    """One level of a program: the whole, or the body of a loop or branch."""

    def __init__(
        self, axis_sizes: dict[str, int], *, cpu: bool = False, inside: bool = False
    ) -> None:
        self._axes, self._cpu, self._inside = axis_sizes, cpu, inside
        self._time = 0.0
        self._buffers: dict[int, _Buffer] = {}
        self._spikes: dict[float, Peak] = {}
        # Sums over devices: XLA for CPU joins those of a body into one.
        self._combined: list[Value] = []

    def run(self, jaxpr: Any, inputs: list[Value], consts: list[Value]) -> list[Value]:
        names: dict[Any, int | None] = dict(zip(jaxpr.invars, range(len(inputs)), strict=True))
        values = dict(enumerate(inputs))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            names[var] = len(values)
            values[len(values)] = value
        nodes: list[_Node] = []
        _flatten(jaxpr, names, nodes, itertools.count(len(values)))
        results = [names.get(v) if _is_var(v) else None for v in jaxpr.outvars]
        nodes = _needed(nodes, results)
        if self._cpu:
            nodes = _as_soon_as_possible(nodes)
        carried = {i for i, value in enumerate(inputs) if value.ours}
        last = _last_uses(nodes, results, carried)
        uses = Counter(i for node in nodes for i in set(node.ins))
        if self._cpu and self._inside and nodes:
            for number, value in enumerate(inputs):
                if uses[number] > 1 and not value.is_buffer:
                    self._materialise(nodes[0].eqn, jaxpr.invars[number], value)
        for number, node in enumerate(nodes):
            self._time += 1
            ins = [Value(0) if i is None else values[i] for i in node.ins]
            final = [i is not None and last.get(i) == number for i in node.ins]
            outs = self._apply(node.eqn, ins, final)
            if self._cpu and node.eqn.primitive.name in MULTI:
                for var, i, out in zip(node.eqn.outvars, node.outs, outs, strict=True):
                    if uses[i] > 1 and not out.is_buffer and out.reads:
                        self._materialise(node.eqn, var, out)
            values.update(zip(node.outs, outs, strict=True))
        return [Value(0) if i is None else values[i] for i in results]

    def peak(self, outputs: list[Value]) -> Peak:
        """The most that is alive at one time, and what it is; outputs live to the end."""
        self._time += 1
        for value in [*outputs, *(self._combined if self._cpu and self._inside else ())]:
            self._touch(value)
        events: dict[float, int] = defaultdict(int)
        for b in self._buffers.values():
            events[b.born] += b.size
            events[b.last + HALF / 2] -= b.size
        for at, spike in self._spikes.items():
            events[at] += spike.size
            events[at + HALF / 2] -= spike.size
        best, best_at, live = 0, 0.0, 0
        for at in sorted(events):
            live += events[at]
            if live > best:
                best, best_at = live, at
        held = [b.about for b in self._buffers.values() if b.born <= best_at <= b.last]
        inner = self._spikes.get(best_at)
        return Peak(best, held + (inner.held if inner else []))

    # One equation

    def _apply(self, eqn: Any, values: list[Value], final: list[bool]) -> list[Value]:
        name = eqn.primitive.name
        alone = name.startswith("psum") and self._ways(eqn.params["axes"]) == 1
        if alone or name in RENAMED or (name == "reshard" and self._same_layout(eqn)):
            return self._renamed(eqn, values)
        if name == "scan":
            return self._scan(eqn, values, final)
        if name == "while":
            return self._while(eqn, values, final)
        if name == "cond":
            return self._cond(eqn, values)
        if name in FUSED:
            reads = frozenset().union(*(v.reads for v in values))
            return [Value(self._size(v.aval), reads) for v in eqn.outvars]
        if name in REDUCED:
            for var, value in zip(eqn.invars, values, strict=True):
                if self._cpu:
                    self._materialise(eqn, var, value)
                self._touch(value)
            return [self._new(eqn, v) for v in eqn.outvars]
        if name in IN_PLACE:
            self._touch(values[1])
            for value in values[2:]:
                self._touch(value)
            self._materialise(eqn, eqn.invars[0], values[0])
            if final[0] and values[0].replaceable:
                return [values[0]]
            return [self._new(eqn, eqn.outvars[0])]
        for var, value in zip(eqn.invars, values, strict=True):
            self._materialise(eqn, var, value)
        outs = [self._new(eqn, v) for v in eqn.outvars]
        if name == "dot_general":
            self._dot(eqn, values[0], outs)
        elif name.startswith("psum") and "model" not in eqn.params["axes"]:
            self._combined += [*(v for v in values if v.is_buffer), *outs]
        return outs

    def _dot(self, eqn: Any, left: Value, outs: list[Value]) -> None:
        """What a matmul needs beside operands and result."""
        (contracted, _), _ = eqn.params["dimension_numbers"]
        aval = eqn.invars[0].aval
        axes = {axis for dim in contracted for axis in _entries(aval)[dim]}
        if self._ways(axes) > 1:
            parts = self._new(eqn, eqn.outvars[0])  # before they are added up
            self._combined += [parts, *outs]
        if self._cpu and contracted and max(contracted) != aval.ndim - 1:
            # XLA's matmul for CPU wants rows of the left operand, transposed as soon as it is made.
            made = [self._buffers[n].born for n in left.reads]
            self._touch(self._new(eqn, eqn.invars[0], min(made, default=self._time)))

    def _renamed(self, eqn: Any, values: list[Value]) -> list[Value]:
        if len(values) == len(eqn.outvars):
            return values
        return [values[0]] * len(eqn.outvars)

    def _same_layout(self, eqn: Any) -> bool:
        """A reshard that moves nothing, or only cuts off a part."""
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        real = {axis for axis in _axes_of(before) if self._ways([axis]) > 1}
        return self._size(after) <= self._size(before) and real <= _axes_of(after)

    # Loops and branches

    def _scan(self, eqn: Any, values: list[Value], final: list[bool]) -> list[Value]:
        n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        body = eqn.params["jaxpr"].jaxpr
        for var, value in zip(eqn.invars, values, strict=True):
            self._materialise(eqn, var, value)
        carries = self._carries(
            eqn,
            values[n_consts : n_consts + n_carry],
            final[n_consts : n_consts + n_carry],
            eqn.outvars[:n_carry],
        )
        stacks = [self._new(eqn, v) for v in eqn.outvars[n_carry:]]
        inputs = [
            # A slice is read where it lies, or copied where it has to be a buffer.
            Value(
                self._size(v.aval),
                is_buffer=number < n_consts + n_carry,
                ours=n_consts <= number < n_consts + n_carry,
            )
            for number, v in enumerate(body.invars)
        ]
        self._spike(self._body(body, inputs, eqn.params["jaxpr"]))
        return carries + stacks

    def _while(self, eqn: Any, values: list[Value], final: list[bool]) -> list[Value]:
        n = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        for var, value in zip(eqn.invars, values, strict=True):
            self._materialise(eqn, var, value)
        carries = self._carries(eqn, values[n:], final[n:], eqn.outvars)
        closed = eqn.params["body_jaxpr"]
        consts = eqn.params["body_nconsts"]
        inputs = [
            Value(self._size(v.aval), is_buffer=True, ours=number >= consts)
            for number, v in enumerate(closed.jaxpr.invars)
        ]
        self._spike(self._body(closed.jaxpr, inputs, closed))
        return carries

    def _cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        for var, value in zip(eqn.invars, values, strict=True):
            self._materialise(eqn, var, value)
        peaks = []
        for closed in eqn.params["branches"]:
            inputs = [Value(self._size(v.aval), is_buffer=True) for v in closed.jaxpr.invars]
            peaks.append(self._body(closed.jaxpr, inputs, closed, outputs_are_ours=True))
        self._spike(max(peaks, key=lambda p: p.size))
        return [self._new(eqn, v) for v in eqn.outvars]

    def _body(
        self, jaxpr: Any, inputs: list[Value], closed: Any, outputs_are_ours: bool = False
    ) -> Peak:
        walk = Walk(self._axes, cpu=self._cpu, inside=True)
        consts = [Value(0, is_buffer=True) for _ in closed.consts]
        outputs = walk.run(jaxpr, inputs, consts)
        if outputs_are_ours:
            for value in outputs:
                for number in value.reads if value.is_buffer else ():
                    walk._buffers[number].size = 0
        return walk.peak([v for v in outputs if v.is_buffer])

    def _carries(
        self, eqn: Any, values: list[Value], final: list[bool], outvars: list[Any]
    ) -> list[Value]:
        """The initial values' own buffers where nothing else needs them."""
        return [
            value if value.replaceable and last else self._new(eqn, var)
            for value, last, var in zip(values, final, outvars, strict=True)
        ]

    # Buffers

    def _new(self, eqn: Any, var: Any, born: float = 0.0) -> Value:
        size = self._size(var.aval)
        number = len(self._buffers)
        born = born or self._time
        about = Held(
            size=size,
            shape=_local_shape(var.aval, self._axes),
            dtype=str(getattr(var.aval, "dtype", "")),
            primitive=eqn.primitive.name,
            where=str(eqn.source_info.name_stack),
            inside=self._inside,
        )
        self._buffers[number] = _Buffer(size, born, born, about)
        return Value(size, frozenset([number]), True)

    def _materialise(self, eqn: Any, var: Any, value: Value) -> None:
        self._touch(value)
        if value.is_buffer or not value.size:
            return
        # In place, where a source of the same size is not read again.
        large = any(self._buffers[n].size >= value.size for n in value.reads)
        fresh = self._new(eqn, var, self._time - HALF if not large else self._time)
        if large:
            for n in value.reads:
                self._buffers[n].last = max(self._buffers[n].born, self._time - HALF)
        value.reads, value.is_buffer = fresh.reads, True
        self._touch(value)

    def _touch(self, value: Value) -> None:
        for number in value.reads:
            self._buffers[number].last = max(self._buffers[number].last, self._time)

    def _spike(self, peak: Peak) -> None:
        self._spikes[self._time] = peak

    def _ways(self, axes: Any) -> int:
        return math.prod(self._axes.get(axis, 1) for axis in axes)

    def _size(self, aval: Any) -> int:
        if not hasattr(aval, "dtype"):
            return 0
        return math.prod(_local_shape(aval, self._axes)) * aval.dtype.itemsize


def peak_of(closed: Any, axis_sizes: dict[str, int], *, cpu: bool = False) -> Peak:
    """Peak of what a program holds beside its inputs, on one device.

    Args:
        closed: a ClosedJaxpr traced on an explicit mesh.
        axis_sizes: of the mesh.
    """
    walk = Walk(axis_sizes, cpu=cpu)
    # Inputs are there before and after; results that replace them take their place.
    inputs = [Value(walk._size(v.aval), is_buffer=True) for v in closed.jaxpr.invars]
    consts = [Value(0, is_buffer=True) for _ in closed.consts]
    outputs = walk.run(closed.jaxpr, inputs, consts)
    return walk.peak([v for v in outputs if v.is_buffer])


def _is_var(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _called(eqn: Any) -> Any:
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    for name in CALLS:
        found = eqn.params.get(name)
        if found is not None:
            return getattr(found, "jaxpr", found)
    return None


@dataclass(frozen=True)
class _Node:
    """An equation, with numbers for its variables; None for a literal."""

    eqn: Any
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]


def _flatten(jaxpr: Any, names: dict[Any, int | None], nodes: list[_Node], fresh: Any) -> None:
    """The equations of a jaxpr and of what it calls, in order; `names` gets all its variables."""
    for eqn in jaxpr.eqns:
        ins = tuple(names[v] if _is_var(v) else None for v in eqn.invars)
        inner = _called(eqn)
        if inner is None:
            outs = tuple(next(fresh) for _ in eqn.outvars)
            nodes.append(_Node(eqn, ins, outs))
        else:
            # Constants of a called function come first, or are closed over: they are small.
            own: dict[Any, int | None] = {v: next(fresh) for v in inner.constvars}
            own.update(zip(inner.invars, ins[len(ins) - len(inner.invars) :], strict=True))
            _flatten(inner, own, nodes, fresh)
            outs = tuple(own[v] if _is_var(v) else None for v in inner.outvars)
        names.update(zip(eqn.outvars, outs, strict=True))


def _needed(nodes: list[_Node], results: list[int | None]) -> list[_Node]:
    wanted = set(results)
    found = []
    for node in reversed(nodes):
        if wanted & set(node.outs):
            wanted |= set(node.ins)
            found.append(node)
    return found[::-1]


def _as_soon_as_possible(nodes: list[_Node]) -> list[_Node]:
    """By depth, as XLA's scheduler for CPU has them, which wants much to run side by side; loops
    and branches when nothing else is ready."""
    maker = {o: number for number, node in enumerate(nodes) for o in node.outs}
    needs = [{maker[i] for i in node.ins if i in maker} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    ranks = []
    for number, node in enumerate(nodes):
        depth = 1 + max((ranks[n][1] for n in needs[number]), default=0)
        ranks.append((node.eqn.primitive.name in LOOPS, depth, number))
        for n in needs[number]:
            readers[n].append(number)
    ready, order = [rank for rank in ranks if not needs[rank[2]]], []
    heapq.heapify(ready)
    while ready:
        _, _, number = heapq.heappop(ready)
        order.append(nodes[number])
        for n in readers[number]:
            needs[n].remove(number)
            if not needs[n]:
                heapq.heappush(ready, ranks[n])
    return order


def _last_uses(nodes: list[_Node], results: list[int | None], carried: set[int]) -> dict[int, int]:
    """Of each variable made or carried here: the last node that reads it; results are never done
    with."""
    made = carried | {o for node in nodes for o in node.outs}
    last = {}
    for number, node in enumerate(nodes):
        last |= {i: number for i in node.ins if i in made}
    return {i: number for i, number in last.items() if i not in results}


def _axes_of(aval: Any) -> set[str]:
    return {axis for entry in _entries(aval) for axis in entry}


def _entries(aval: Any) -> list[tuple[str, ...]]:
    spec = getattr(getattr(aval, "sharding", None), "spec", None)
    if spec is None:
        return [() for _ in getattr(aval, "shape", ())]
    found = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return found + [()] * (len(aval.shape) - len(found))


def _local_shape(aval: Any, axis_sizes: dict[str, int]) -> tuple[int, ...]:
    shape = getattr(aval, "shape", ())
    return tuple(
        -(-int(dim) // math.prod(axis_sizes[a] for a in axes))
        for dim, axes in zip(shape, _entries(aval), strict=True)
    )
