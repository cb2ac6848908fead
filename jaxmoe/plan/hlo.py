"""The text of a compiled program: its computations, who runs which how often, and array types.

Of XLA's text format only what collectives and memory need. Instructions are one to a line; their
attributes may hold line breaks of their own, so what does not look like an instruction is skipped.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

# Bytes of an element. `pred` is a byte; 4-bit types are packed in pairs.
_WIDTHS = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# %name = TYPE op(operands...), attributes. A type that is a tuple has no operator-like word in it.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|token|[sufc]\d+[a-z0-9]*)\[([\d,]*)\]")
_COMPARE = re.compile(
    r"ROOT %?[\w.\-]+ = pred\[\]\S* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT"
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    dtype: str  # XLA's name, such as bf16
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.elements * width(self.dtype))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    @property
    def arrays(self) -> list[Array]:
        """Of the result, a tuple's in order."""
        return arrays(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = []
        for several, one in _CALLED.findall(self.rest):
            names += [n.strip(" %") for n in several.split(",")] if several else [one]
        return names

    @property
    def operands(self) -> list[str]:
        inside = re.sub(r"/\*.*?\*/", "", self.rest).split(")")[0]
        return re.findall(r"%?([\w.\-]+)(?:, |$)", inside)

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass
class Computation:
    name: str
    lines: list[str] = field(default_factory=list)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [Instruction(*m.groups()) for m in map(_INSTRUCTION.match, self.lines) if m]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    def constant(self, name: str) -> int | None:
        """The value of an integer that is one, or a copy of one."""
        found = self.by_name.get(name)
        while found is not None and found.op in ("copy", "bitcast", "copy-done", "copy-start"):
            found = self.by_name.get(found.operands[0])
        if found is None or found.op != "constant":
            return None
        value = re.match(r"(-?\d+)\)", found.rest)
        return int(value[1]) if value else None


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction, within: Computation) -> int | None:
        """Times that a `while` of a computation runs its body: as XLA noted it, or from a condition
        that compares a counter with a constant. The counter begins at 0 (jax.lax.scan), or later
        where the compiler peeled iterations off. None: the length depends on the data."""
        noted = re.search(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.rest)
        if noted:
            return int(noted[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        compared = next(
            filter(None, map(_COMPARE.search, condition.lines if condition else ())), None
        )
        if condition is None or compared is None:
            return None
        end = condition.constant(compared[2])
        counter = condition.by_name.get(compared[1])
        index = re.search(r"index=(\d+)", counter.rest) if counter else None
        if end is None or index is None:
            return None
        begins = within.by_name.get(loop.operands[0])
        start = None
        if begins is not None and begins.op == "tuple":
            start = within.constant(begins.operands[int(index[1])])
        return end - (start or 0)


def parse(text: str) -> Program:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and line.startswith("  "):
            current.lines.append(line)
    assert entry, "no ENTRY computation: this is not the text of a compiled program"
    return Program(computations, entry)


def arrays(type_text: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(type_text)
    ]


def members(type_text: str) -> list[str]:
    """Of a tuple's type, whose own members may be tuples."""
    found, depth, text = [""], 0, type_text.strip()
    for c in text[1:-1] if text.startswith("(") else text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [member.strip() for member in found]


def width(dtype: str) -> float:
    """Bytes of an element: 2 of f16, 1 of f8e4m3fn, 4 of s32."""
    if dtype in _WIDTHS:
        return _WIDTHS[dtype]
    bits = re.match(r"[suf](\d+)", dtype)
    assert bits, dtype
    return int(bits[1]) / 8


def largest(program: Program, n: int | None = None) -> Iterator[tuple[Array, str]]:
    """The n largest distinct arrays that live in memory (None: all), each with the operator that
    first makes one; a fusion's insides do not live anywhere."""
    inside = {
        name
        for computation in program.computations.values()
        for i in computation.instructions
        if i.op == "fusion"
        for name in i.called
    }
    made: dict[Array, str] = {}
    for computation in program.computations.values():
        if computation.name in inside:
            continue
        for i in computation.instructions:
            if i.op in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
                continue
            for array in i.arrays:
                made.setdefault(array, i.op)
    yield from sorted(made.items(), key=lambda pair: -pair[0].bytes)[:n]
