"""One step of a run again: on the same devices, and on others, from the state before it.

Bits are compared, not values: the same program on sound devices gives the same bits, also where
device k stands in for device k + 1, since each part of an array is computed by the same operations
whoever does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jaxmoe import tree
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES
from jaxmoe.run import record, seal
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.run.state import TrainState

__all__ = ["Difference", "Snapshot", "checkpoint_before", "differences", "restore", "rolled"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A part of an array of the state that two replays do not agree on.

    Attributes:
        name: of the array, such as params/layers/...; index: of its first element that differs.
        elements: how many differ; devices: that held it, in the first replay and in the other.
    """

    name: str
    index: tuple[int, ...]
    elements: int
    devices: tuple[str, str]

    def __str__(self) -> str:
        first, other = self.devices
        where = first if first == other else f"{first} and {other}"
        at = ", ".join(map(str, self.index))
        return f"{self.name} at [{at}] on {where}: {self.elements} elements"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state on the host, by parts as the devices hold them.

    Attributes:
        parts: name of an array -> start of a part in it -> (values, device).
    """

    parts: Mapping[str, Mapping[tuple[int, ...], Sequence[tuple[np.ndarray, str]]]]

    @classmethod
    def of(cls, state: Any) -> "Snapshot":
        parts: dict[str, dict[tuple[int, ...], list[tuple[np.ndarray, str]]]] = {}
        for name, array in tree.named_leaves(state):
            for shard in array.addressable_shards:
                start = _start(shard.index, array.ndim)
                held = (np.asarray(shard.data), str(shard.device))
                parts.setdefault(name, {}).setdefault(start, []).append(held)
        return cls(parts=parts)

    def put(self, like: Any) -> Any:
        """The state again, on the shardings of `like`, a tree of ShapeDtypeStruct whose parts are
        cut alike."""

        def one(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return self.parts[name][_start(index, len(leaf.shape))][0][0]

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        return tree.map_named(one, like)


def differences(first: Snapshot, other: Snapshot) -> Iterator[Difference]:
    """Parts whose bits differ: between the snapshots, and between copies of a part within one."""
    for name, places in first.parts.items():
        for start, copies in places.items():
            values, device = copies[0]
            for more, there in [*copies[1:], *other.parts[name][start]]:
                unlike = _bits(values) != _bits(more)
                if unlike.any():
                    at = np.unravel_index(int(np.argmax(unlike)), values.shape)
                    yield Difference(
                        name=name,
                        index=tuple(int(a + s) for a, s in zip(at, start, strict=True)),
                        elements=int(unlike.sum()),
                        devices=(device, there),
                    )


def checkpoint_before(run_dir: Path, step: int) -> Path:
    """The newest whole checkpoint from which a step can be reached.

    Raises:
        UserError: there is none.
    """
    folder = run_dir / record.CHECKPOINTS
    steps = record.checkpoint_steps(run_dir)
    broken = []
    for one in reversed([s for s in steps if s <= step]):
        if (reason := seal.problem(folder / str(one), ITEMS)) is None:
            return folder / str(one)
        broken.append(f"{one}: {reason}")
    kept = ", ".join(map(str, steps)) or "none"
    raise UserError(
        f"--step {step}: no whole checkpoint at or before it in {folder} (there are {kept}"
        f"{'; ' + '; '.join(broken) if broken else ''})"
    )


def restore(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, which is read and nothing else.

    Raises:
        UserError: its arrays cannot be read, or are not those of the run's config.
    """
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(checkpoint.absolute() / "state", abstract)
    except Exception as error:  # whatever the storage layers raise
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"{checkpoint}: it cannot be restored ({said})") from error


def rolled(mesh: Mesh) -> Mesh:
    """The same mesh with every device one place on."""
    devices = np.roll(mesh.devices.ravel(), 1).reshape(mesh.devices.shape)
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


def _start(index: Sequence[slice], ndim: int) -> tuple[int, ...]:
    return tuple(int(s.start or 0) for s in (*index, *[slice(0)] * (ndim - len(index))))


def _bits(values: np.ndarray) -> np.ndarray:
    """As unsigned integers, so that NaN equals itself and -0 is not 0."""
    return values.view(f"u{values.dtype.itemsize}")
