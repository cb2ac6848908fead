"""What a compiled program sends over which mesh axes: read from its text.

Devices of a program are numbered in the order of the mesh, so the group that a collective runs in
says over which axes it goes, whatever the compiler made of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxmoe.plan import hlo
from jaxmoe.plan.hlo import Computation, Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Between slices of TPUs nothing is a collective any more: hosts send, by libtpu's runtime for them.
SLICES = "between slices"

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
# Axes of a mesh of the compiler's own: replica_groups=mesh['a'=2,'b'=4], device_ids=(...) {'b'}.
_MESH = re.compile(
    r"replica_groups=@?mesh\w*\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\])?"
    r"(?:T\(([\d,]+)\))?([\d,]*)\))? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Collectives of one kind over the same axes.

    Attributes:
        kind: one of KINDS, or "send" with SLICES for its axes.
        axes: mesh axes that the groups span, in the mesh's order.
        dtype: XLA's name; several joined by "+" where one collective carries more than one.
        count: how often one runs in a step.
        bytes: per device and step, the larger of what goes in and what comes out.
        sent: per device and step, what a device must send at least: by a ring, or to its peers.
        partial: the groups are only a part of the axes' product.
        unknown: some run in a loop whose length the program does not tell, and count once.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int
    bytes: int
    sent: int
    partial: bool = False
    unknown: bool = False


def collectives(program: Program, shape: Mapping[str, int]) -> list[Row]:
    """All that a step sends, the largest first.

    A loop's count as often as it runs. Of a conditional's branches that send something the one
    that sends least counts: the exchange of experts has one for each size of its buffers, and the
    first suffices as a rule. So a pipeline's bubbles count as if they were busy.

    Args:
        program: a compiled one.
        shape: sizes of the mesh's axes, in order.
    """
    found = _merged(_run(program, program.entry, shape, {}))
    return sorted(found, key=lambda row: (-row.sent, row.kind, row.axes, row.dtype))


def _run(
    program: Program, name: str, shape: Mapping[str, int], known: dict[str, list[Row]]
) -> list[Row]:
    """What one run of a computation sends."""
    if name not in known:
        rows: list[Row] = []
        computation = program.computations.get(name) or Computation(name)
        for i in computation.instructions:
            own = _row(i, shape)
            rows += [own] if own else _called(program, computation, i, shape, known)
        # libtpu's reduce-scatter: a fusion of an all-reduce and the slice that is kept.
        if name.startswith("all-reduce-scatter"):
            rows = [replace(r, kind="reduce-scatter", sent=r.sent // 2) for r in rows]
        known[name] = _merged(rows)
    return known[name]


def _called(
    program: Program,
    within: Computation,
    i: Instruction,
    shape: Mapping[str, int],
    known: dict[str, list[Row]],
) -> list[Row]:
    each = [_run(program, name, shape, known) for name in i.called]
    if not any(each):
        return []
    if i.op == "conditional":
        sending = [rows for rows in each if rows]  # a pipeline's bubble sends nothing
        return min(sending, key=lambda rows: sum(row.sent for row in rows))
    rows = [row for rows in each for row in rows]
    if i.op != "while":
        return rows
    times = program.trip_count(i, within)
    if times is None:
        return [replace(row, unknown=True) for row in rows]
    return [
        replace(row, count=row.count * times, bytes=row.bytes * times, sent=row.sent * times)
        for row in rows
    ]


def _merged(rows: list[Row]) -> list[Row]:
    alike: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.kind, row.axes, row.dtype, row.partial].append(row)
    return [
        replace(
            same[0],
            count=sum(row.count for row in same),
            bytes=sum(row.bytes for row in same),
            sent=sum(row.sent for row in same),
            unknown=any(row.unknown for row in same),
        )
        for same in alike.values()
    ]


def _row(i: Instruction, shape: Mapping[str, int]) -> Row | None:
    """Of one instruction; None where it is no collective, or its groups are single devices."""
    kind = i.op.removesuffix("-start")
    if i.op == "send" and "megascale" in i.rest:
        (sent, *_) = hlo.arrays(hlo.members(i.type)[0])
        return Row(
            kind="send",
            axes=(SLICES,),
            dtype=sent.dtype,
            count=1,
            bytes=sent.bytes,
            sent=sent.bytes,
        )
    if kind not in KINDS:
        return None
    axes, ways, partial = _spanned(i.rest, shape)
    if ways == 1:
        return None
    # What starts is (operands, results, context), but for an all-reduce, which has results alone.
    started = i.op.endswith("-start") and kind != "all-reduce"
    arrays = hlo.arrays(hlo.members(i.type)[1]) if started else i.arrays
    size = sum(a.bytes for a in arrays) * (ways if kind == "reduce-scatter" else 1)
    # A ring passes (n - 1) / n of the whole on, an all-reduce twice; a permute all that it has.
    share = 1.0 if kind == "collective-permute" else (ways - 1) / ways
    return Row(
        kind=kind,
        axes=axes,
        dtype="+".join(sorted({a.dtype for a in arrays})),
        count=1,
        bytes=size,
        sent=round(size * share * (2 if kind == "all-reduce" else 1)),
        partial=partial,
    )


def _spanned(text: str, shape: Mapping[str, int]) -> tuple[tuple[str, ...], int, bool]:
    """The axes that a collective goes over; devices of a group; whether that is only a part."""
    names, sizes = list(shape), tuple(shape.values())
    pairs = _PAIRS.search(text)
    if pairs:
        ids = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), np.int64).reshape(-1, 2)
        differ = [c[:, 0] != c[:, 1] for c in np.unravel_index(ids, sizes)]
        # A permute from each device to itself moves nothing.
        axes = tuple(n for n, d in zip(names, differ, strict=True) if d.any())
        return axes, 2 if axes else 1, False
    groups = replica_groups(text, math.prod(sizes))
    coordinates = np.unravel_index(groups, sizes)
    spans = [(c != c[:, :1]).any() for c in coordinates]
    axes = tuple(n for n, s in zip(names, spans, strict=True) if s)
    return axes, groups.shape[1], groups.shape[1] < math.prod(shape[a] for a in axes)


def replica_groups(text: str, n: int) -> np.ndarray:
    """int64 [groups, devices of a group], from any of the forms that XLA writes."""
    everyone = np.arange(n)
    if found := _IOTA.search(text):
        groups, over, order = (_ints(part) for part in found.groups(""))
        ids = everyone.reshape(over)
        return (ids.transpose(order) if order else ids).reshape(groups)
    if found := _MESH.search(text):
        dims, over, order, listed, axes = found.groups("")
        ids = np.array(_ints(listed)) if listed else everyone
        ids = ids.reshape(_ints(over)) if over else ids
        return _of_mesh(ids.transpose(_ints(order)) if order else ids, dims, axes)
    found = _LISTED.search(text)
    assert found, text[:200]
    lists = [_ints(part) for part in re.findall(r"\{([\d,]*)\}", found[1])]
    # {} and, of programs with one replica, {{0}} with a channel: all devices together.
    if not lists or lists == [[0]]:
        return everyone[None]
    return np.array(lists, np.int64)


def _of_mesh(ids: np.ndarray, dims: str, axes: str) -> np.ndarray:
    """`dims`: 'a'=2,'b'=4; `axes`: 'b', or 'b':(2)2 for the part of b of size 2 after one of 2."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", dims)}
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    parts.sort(key=lambda part: int(part[1] or 1))
    split: list[int] = []
    chosen: list[int] = []
    for name, size in shape.items():
        for before, own in _cuts(size, [(p, o) for axis, p, o in parts if axis == name]):
            split.append(before)
            if own:
                chosen.append(len(split))
                split.append(own)
    others = [d for d in range(len(split)) if d not in chosen]
    grid = ids.reshape(split).transpose([*others, *chosen])
    return grid.reshape(-1, math.prod(split[d] for d in chosen))


def _cuts(size: int, parts: list[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """A dim as pairs: what is not chosen, then what is; 0 for nothing at the end."""
    done = 1
    for before, own in parts:
        ahead, wide = (int(before), int(own)) if own else (1, size)
        yield ahead // done, wide
        done = ahead * wide
    yield size // done, 0


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]
