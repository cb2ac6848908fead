"""Faults that are rehearsed (`faults` of the config): what strikes, when, and that it did.

Each strikes once in a run, however often that is started: a line in faults.jsonl, written before,
says so. What process 0 read there when it started goes for all.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh as mesh_lib
from jaxmoe import tree
from jaxmoe.config import Config, FaultConfig, fingerprint
from jaxmoe.data.damage import Guard
from jaxmoe.errors import UserError
from jaxmoe.run.record import Tell, now, read_lines
from jaxmoe.run.state import param_specs
from jaxmoe.run.watching import told_to_all
from jaxmoe.spec import is_spec

__all__ = ["FILE", "Faults", "flipped", "in_gradients", "in_rate", "strikes_step"]

FILE = "faults.jsonl"
IN_STEP = ("nan-gradient", "flip-gradient", "rate-slip")  # compiled into the step
ON_DISK = ("truncate-checkpoint", "flip-checkpoint")
LASTING = ("slow", "rate-slip", "duplicate-data")
QUIET_NAN = 0x7FC00000


class Faults:
    """Of one start of a run."""

    def __init__(
        self, config: Config, mesh: Mesh, data: Guard | None, folder: Path, tell: Tell
    ) -> None:
        """`data`: of the training text's shards; `tell`: of (what, step, why), an event.

        Raises:
            UserError: there is nothing of the kind to strike.
        """
        self._config, self._mesh, self._folder, self._tell = config, mesh, folder, tell
        rows = told_to_all([(row["fault"], row["of"]) for row in read_lines(folder / FILE)])
        struck = {(number, of) for number, of in rows}
        self._left = {
            n: f for n, f in enumerate(config.faults) if (n, fingerprint(f)) not in struck
        }
        self._data = data
        self._told: set[int] = set()
        self._specs = param_specs(config)
        for fault in self._left.values():
            self._check(fault)

    def _check(self, fault: FaultConfig) -> None:
        if fault.kind == "zero-expert" and fault.expert >= self._config.model.n_experts:
            raise UserError(f"faults: there is no expert {fault.expert} to zero")
        if fault.rank >= jax.process_count():
            raise UserError(f"faults: there is no rank {fault.rank} of {jax.process_count()}")
        if fault.device >= self._mesh.size:
            raise UserError(f"faults: there is no device {fault.device} among {self._mesh.size}")
        names = [name for name, _ in tree.named_leaves(self._specs, is_leaf=is_spec)]
        if not any(fault.array in name for name in names):
            raise UserError(
                f"faults: no parameter's name has {fault.array!r} in it; there are"
                f" {', '.join(names)}"
            )

    def before(self, step: int, state: Any) -> Any:
        """Strikes before update `step` of the run (the first is 1); the state to go on with."""
        for number, fault in [*self._left.items()]:
            on = self._on(fault, step)
            if on and fault.kind in ("kill", "hang", "slow"):
                if step == fault.step:
                    self._strike(number, step, rank=fault.rank)
                if fault.rank == jax.process_index():
                    _halt(fault)
            elif on and fault.kind == "flip-parameter":
                self._strike(number, step)
                device, name = self._mesh.devices.flat[fault.device], _chosen(state.params, fault)
                params = flipped(state.params, name, device, fault.index, fault.bit)
                state = state.replace(params=params)
            elif on and fault.kind == "zero-expert":
                self._strike(number, step)
                state = state.replace(params=self._zeroed(state.params, fault))
            elif on and fault.kind in (*IN_STEP, "duplicate-data") and step == fault.step:
                self._strike(number, step)
            if step >= fault.step + fault.steps and fault.kind in LASTING:
                self._left.pop(number, None)
        return state

    def in_step(self, step: int) -> Any:
        """uint32 [3]: what is flipped in a gradient, what is set in it, and the bits of what the
        rate is multiplied by."""
        flip, put, rate = 0, 0, 1.0
        for fault in self._left.values():
            if self._on(fault, step):
                flip |= (1 << fault.bit) if fault.kind == "flip-gradient" else 0
                put |= QUIET_NAN if fault.kind == "nan-gradient" else 0
                rate *= fault.factor if fault.kind == "rate-slip" else 1
        found = np.array([flip, put, np.float32(rate).view(np.uint32)], np.uint32)
        return mesh_lib.everywhere(self._mesh, found)

    def read_instead(self, index: int) -> int:
        """The step whose batch is drawn for the one with this index, from 0."""
        for fault in self._left.values():
            if fault.kind == "duplicate-data" and self._on(fault, index + 1):
                return max(0, fault.step - 2)
        return index

    def before_reading(self, index: int) -> None:
        """Strikes the data before the batch of the step with this index, from 0, is read.

        Raises:
            UserError: no shard is compared with its sum.
        """
        for number, fault in [*self._left.items()]:
            if fault.kind == "damage-shard" and self._on(fault, index + 1):
                self._strike(number, index + 1)
                if self._data is None or not self._data.rehearse(fault.index):
                    raise UserError("faults: there is no shard of files to damage")

    def damages(self, step: int) -> bool:
        """Whether the checkpoint of a step is to be damaged, once it is whole."""
        return any(f.kind in ON_DISK and f.step == step for f in self._left.values())

    def damage(self, step: int, folder: Path) -> None:
        """The checkpoint of a step, in its folder."""
        for number, fault in [*self._left.items()]:
            if fault.kind in ON_DISK and fault.step == step:
                self._strike(number, step)
                if jax.process_index() == 0:
                    _damage(folder, fault)

    def disk_full(self, step: int) -> bool:
        """Whether this process's part of the checkpoint of a step meets a full disk."""
        for number, fault in [*self._left.items()]:
            if fault.kind == "disk-full" and fault.step <= step:
                self._strike(number, step, rank=fault.rank)
                return fault.rank == jax.process_index()
        return False

    def _on(self, fault: FaultConfig, step: int) -> bool:
        lasts = fault.steps if fault.kind in LASTING else 1
        return fault.step <= step < fault.step + lasts

    def _strike(self, number: int, step: int, rank: int = 0) -> None:
        """Written before it happens: what kills could not tell of it."""
        fault = self._left[number]
        if number in self._told:  # a rollback came back to it
            return
        self._told.add(number)
        if fault.kind not in (*LASTING, *IN_STEP):
            del self._left[number]
        if jax.process_index() == rank:
            with open(self._folder / FILE, "a") as out:
                line = {"fault": number, "of": fingerprint(fault), "kind": fault.kind}
                line |= {"step": step, "time": now()}
                out.write(json.dumps(line) + "\n")
                out.flush()
                os.fsync(out.fileno())
        self._tell("fault", step, f"rehearsed: {fault.kind}, as faults[{number}] says")

    def _zeroed(self, params: Any, fault: FaultConfig) -> Any:
        def one(spec: Any, array: jax.Array) -> jax.Array:
            if "experts" not in spec.axes:
                return array
            dim = spec.axes.index("experts")
            kept = np.arange(array.shape[dim]) != fault.expert
            shape = [-1 if d == dim else 1 for d in range(array.ndim)]
            return jax.jit(lambda a: a * kept.reshape(shape), donate_argnums=0)(array)

        return jax.tree.map(one, self._specs, params, is_leaf=is_spec)


def flipped(arrays: Any, name: str, device: Any, index: int, bit: int) -> Any:
    """One bit of one element of what one device holds of an array; copies elsewhere keep theirs."""

    def one(other: str, array: jax.Array) -> jax.Array:
        if other != name:
            return array
        parts = []
        for shard in array.addressable_shards:
            values = np.array(shard.data)
            if shard.device == device:
                values.reshape(-1).view(np.uint32)[index % values.size] ^= np.uint32(1 << bit)
            parts.append(jax.device_put(values, shard.device))
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    return tree.map_named(one, arrays)


def strikes_step(config: Config) -> bool:
    """Whether the compiled step has a place for faults."""
    return any(fault.kind in IN_STEP for fault in config.faults)


def in_gradients(grads: Any, fault: jax.Array, config: Config) -> Any:
    """Gradients with what `Faults.in_step` says, in what one device holds of one array."""
    struck = [f for f in config.faults if f.kind in ("nan-gradient", "flip-gradient")]
    if not struck:
        return grads
    first = struck[0]
    chosen = _chosen(grads, first)

    def one(name: str, whole: jax.Array) -> jax.Array:
        if name != chosen:
            return whole
        sharding = jax.typeof(whole).sharding

        def local(part: jax.Array, fault: jax.Array) -> jax.Array:
            bits = jax.lax.bitcast_convert_type(part, jnp.uint32).reshape(-1)
            axes, sizes = sharding.mesh.axis_names, sharding.mesh.axis_sizes
            number = jnp.int32(0)
            for axis, size in zip(axes, sizes, strict=True):
                number = number * size + jax.lax.axis_index(axis)
            at = first.index % bits.size
            bent = bits.at[at].set((bits[at] ^ fault[0]) | fault[1])
            bits = jnp.where(number == first.device, bent, bits)
            return jax.lax.bitcast_convert_type(bits, jnp.float32).reshape(part.shape)

        specs = (sharding.spec, P())
        mapped = jax.shard_map(local, in_specs=specs, out_specs=sharding.spec, check_vma=False)
        return mapped(whole, fault)

    return tree.map_named(one, grads)


def in_rate(updates: Any, fault: jax.Array) -> Any:
    """Updates times the factor that the rate has slipped by."""
    factor = jax.lax.bitcast_convert_type(fault[2], jnp.float32)
    return jax.tree.map(lambda u: u * factor, updates)


def _chosen(params: Any, fault: FaultConfig) -> str:
    return next(name for name, _ in tree.named_leaves(params) if fault.array in name)


def _halt(fault: FaultConfig) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(fault.seconds if fault.kind == "slow" else 10**9)


def _damage(folder: Path, fault: FaultConfig) -> None:
    """To the largest file of a checkpoint."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        if fault.kind == "truncate-checkpoint":
            stream.truncate(size // 2)
            return
        at = fault.index % size
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << fault.bit % 8)]))
