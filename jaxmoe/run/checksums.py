"""Whether devices that hold copies of one part of the state still hold the same bits.

Every device adds up the words of what it holds, modulo 2^32: one flipped bit always changes the
sum. Copies stay equal as long as all devices compute alike, since each makes the same update of the
same gradient. What no second device holds cannot be compared.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe import tree

__all__ = ["Checksums", "Mismatch"]

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Copies of a part of an array that are not the same.

    Attributes:
        name: of the array; start: of the part in it.
        suspects: the devices that are not with the majority; all that hold the part, where there is
            none.
    """

    name: str
    start: tuple[int, ...]
    suspects: tuple[str, ...]

    def __str__(self) -> str:
        at = ", ".join(map(str, self.start))
        return f"{self.name} from [{at}] on {' or '.join(self.suspects)}"


class Checksums:
    """Of the arrays of a state of which parts are held by several devices.

    Attributes:
        share: of the state's bytes, that a second device holds.
    """

    def __init__(self, mesh: Mesh, state: Any) -> None:
        """`state`: arrays, or their shapes and shardings."""
        self._devices = list(mesh.devices.flat)
        self._axes = mesh.axis_names
        self._groups = {
            name: groups
            for name, leaf in tree.named_leaves(state)
            if (groups := _groups(leaf, self._devices))
        }
        sizes = {name: _bytes(leaf) for name, leaf in tree.named_leaves(state)}
        compared = sum(sizes[name] for name in self._groups)
        self.share = compared / max(1, sum(sizes.values()))
        self._sums = jax.jit(self._add_up)

    def of(self, state: Any) -> jax.Array:
        """uint32 [devices, arrays], on all of them; ready when the device gets there."""
        return self._sums([leaf for name, leaf in tree.named_leaves(state) if name in self._groups])

    def mismatches(self, sums: jax.Array) -> Iterator[Mismatch]:
        """From what `of` gave."""
        values = np.asarray(sums)
        for column, (name, groups) in enumerate(self._groups.items()):
            for start, devices in groups.items():
                found = [int(values[device, column]) for device in devices]
                if len(set(found)) > 1:
                    common, times = Counter(found).most_common(1)[0]
                    clear = times > len(found) / 2
                    odd = [
                        d for d, v in zip(devices, found, strict=True) if v != common or not clear
                    ]
                    suspects = tuple(str(self._devices[device]) for device in odd)
                    yield Mismatch(name=name, start=start, suspects=suspects)

    def _add_up(self, leaves: list[jax.Array]) -> jax.Array:
        def local(*parts: jax.Array) -> jax.Array:
            return jnp.stack([_sum(part) for part in parts])[None]

        specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
        mapped = jax.shard_map(local, in_specs=specs, out_specs=P(self._axes), check_vma=False)
        return jax.reshard(mapped(*leaves), P())


def _sum(part: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(part, WORDS[part.dtype.itemsize])
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _groups(leaf: Any, devices: list[Any]) -> Mapping[tuple[int, ...], list[int]]:
    """By the start of a part: the devices that hold it, by number. {} where each has its own."""
    places = leaf.sharding.devices_indices_map(leaf.shape)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, device in enumerate(devices):
        groups.setdefault(tuple(one.start or 0 for one in places[device]), []).append(number)
    return {start: held for start, held in groups.items() if len(held) > 1}


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
