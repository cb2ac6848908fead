"""The device mesh: six axes that always exist, and the tables that map logical axes to them.

    replica  data parallel across slow links      context  sequence
    stage    pipeline                             expert   experts
    data     fully sharded data parallel          model    tensor

All axes are `AxisType.Explicit`: shardings are part of an array's type, and what is ambiguous is
an error at trace time instead of a guess of the compiler.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import tree
from jaxmoe.config import MeshConfig
from jaxmoe.errors import UserError
from jaxmoe.spec import Spec, is_spec

AXES = ("replica", "stage", "data", "context", "expert", "model")

# The batch is spread over every axis that is not busy with something else. The expert axis is one:
# tokens sit on all its devices, and travel to their experts by all-to-all. The stage axis is one
# too, but inside of the pipeline: embedding, head and layers outside of it are spread over stages.
BATCH = ("replica", "data", "expert", "stage")
REPLICA = "replica"

Array = jax.Array
MeshAxes = tuple[str, ...]

# How parameters rest: every large dim sharded. Dense weights shard their embed dim over `expert` as
# well, since that axis holds other tokens but no part of them; experts' weights already use it. The
# `context` axis, which holds other positions, is used likewise by both.
STORE: dict[str, MeshAxes] = {
    "rounds": (),
    "layers": ("stage",),
    "others": (),  # layers outside of the pipeline
    "vocab": ("model",),
    "embed": ("data", "expert", "context"),
    "expert_embed": ("data", "context"),
    "out_embed": (),  # of a matrix whose other dim is `embed`
    "heads": ("model",),
    "one_head": (),  # multi-query: the only key/value head is kept by all
    "head": (),
    "latent": (),  # of MLA, where it is made
    "latent_in": ("data", "expert", "context"),  # and where it is used
    "ff": ("model",),
    "experts": ("expert",),
    "norm": (),
    "router": (),
}

# How a layer uses them: FSDP's axes are gathered, tensor and expert axes stay. The experts gather
# their own `data` axis (model/moe.py), lest a scan keeps the gathered weights of all layers for the
# backward pass.
COMPUTE: dict[str, MeshAxes] = {**STORE, "embed": (), "latent_in": ()}

# What a layer multiplies with: COMPUTE, after the experts' own gather.
IN_USE: dict[str, MeshAxes] = {**COMPUTE, "expert_embed": ()}

Rules = dict[str, MeshAxes]


def sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """Axis sizes; data=-1 takes the devices that are left.

    Raises:
        UserError: the product is not the number of devices.
    """
    shape = {axis: getattr(config, axis) for axis in AXES}
    others = math.prod(size for axis, size in shape.items() if axis != "data")
    if shape["data"] == -1:
        shape["data"] = max(1, n_devices // others)
    product = math.prod(shape.values())
    if product != n_devices:
        raise UserError(
            f"the mesh {describe(shape)} needs {product} devices, but there are {n_devices};"
            " change mesh.* (mesh.data=-1 takes what is left), the device count, or on CPU"
            " mesh.emulate"
        )
    return shape


def describe(shape: Mapping[str, int]) -> str:
    """Sizes of a mesh's axes, for people: those that are used."""
    return " x ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1) or "one device"


def devices_wanted(config: MeshConfig, n_processes: int) -> int:
    """CPU devices each process should emulate, so that the mesh's product is met."""
    if config.emulate:
        return config.emulate
    product = math.prod(max(1, getattr(config, axis)) for axis in AXES)
    return max(1, product // n_processes)


def build(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all processes."""
    return over(config, jax.devices())


def over(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh over all of these devices, which may be a topology's: the later an axis comes in
    AXES, the nearer are its neighbours. Slow links between slices of TPUs (or NVLink domains, where
    JAX knows of several) go to the first axes that they divide.

    Raises:
        UserError: the product is not the number of devices.
    """
    # JAX's own helpers may silently take a subset of the devices, so the product comes first.
    shape = tuple(sizes(config, len(devices)).values())
    return Mesh(arranged(shape, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices as `over` has them."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    if len(slices) == 1:
        return _split_if_needed(mesh_utils.create_device_mesh, shape, devices)
    outer = across(shape, len(slices))
    inner = tuple(size // far for size, far in zip(shape, outer, strict=True))
    return _split_if_needed(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)


def across(shape: Sequence[int], n_slices: int) -> tuple[int, ...]:
    """How often each axis crosses slow links: as much as divides on the first axes."""
    left, parts = n_slices, []
    for size in shape:
        parts.append(math.gcd(size, left))
        left //= parts[-1]
    if left > 1:
        text = describe(dict(zip(AXES, shape, strict=True)))
        raise UserError(f"{n_slices} slices cannot share the mesh {text} evenly; set mesh.replica")
    return tuple(parts)


def _split_if_needed(make: Any, *arguments: Any) -> np.ndarray:
    """Devices by `make`: an axis on whole physical ones (rings), where the sizes allow it."""
    try:
        return make(*arguments)
    except NotImplementedError:
        return make(*arguments, allow_split_physical_axes=True)


def abstract(
    config: MeshConfig, n_devices: int, device: AbstractDevice | None = None
) -> AbstractMesh:
    """A mesh without devices: type-checks a step of any size on any machine. What depends on the
    kind of device is traced for `device`, or for those that are here."""
    shape = tuple(sizes(config, n_devices).values())
    types = (AxisType.Explicit,) * len(AXES)
    return AbstractMesh(shape, AXES, axis_types=types, abstract_device=device)


def partition(spec: Spec, rules: Rules) -> P:
    """The PartitionSpec of a parameter under a rule table."""
    return P(*(_entry(rules[axis]) for axis in spec.axes))


def shardings(specs: Any, mesh: Mesh | AbstractMesh, rules: Rules = STORE) -> Any:
    """NamedSharding of every parameter.

    Raises:
        UserError: a dim that its mesh axes do not divide.
    """

    def one(name: str, spec: Spec) -> NamedSharding:
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            ways = math.prod(mesh.shape[a] for a in rules[axis])
            if size % ways:
                over = " x ".join(f"{a}={mesh.shape[a]}" for a in rules[axis])
                raise UserError(
                    f"{name}: its {axis} dim of {size} does not divide over the mesh axes {over}"
                )
        return NamedSharding(mesh, partition(spec, rules))

    return tree.map_named(one, specs, is_leaf=is_spec)


def check_batch(mesh: Mesh | AbstractMesh, name: str, batch_size: int, parts: int = 1) -> None:
    """Raises UserError unless the batch, or each of its parts (train.accumulate), divides over the
    axes that share it."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % (parts * ways):
        over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH)
        of = f" in train.accumulate={parts} parts" if parts > 1 else ""
        raise UserError(f"{name}={batch_size}{of} does not divide over the mesh axes {over}")


@jax.named_scope("gather")
def gather(params: Any, specs: Any, dtype: jnp.dtype) -> Any:
    """A layer's parameters as it uses them: cast to `dtype` first (half the bytes move), then
    resharded from STORE to COMPUTE."""

    def one(spec: Spec, param: jax.Array) -> jax.Array:
        return jax.reshard(param.astype(dtype) if spec.cast else param, partition(spec, COMPUTE))

    return jax.tree.map(one, specs, params, is_leaf=is_spec)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH, *(None,) * (ndim - 1)))


def global_array(mesh: Mesh, shape: tuple[int, ...], rows: Any) -> jax.Array:
    """A batch sharded over its first dim; `rows(start, stop) -> np.ndarray` is asked only for the
    rows that this process's devices hold."""

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)

    return jax.make_array_from_callback(shape, batch_sharding(mesh, len(shape)), shard)


def batch() -> MeshAxes:
    """The axes that the batch is spread over here: inside of the pipeline not `stage`. Inside of
    a shard_map over all axes, ask what is `varying` instead."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in BATCH if axis not in manual)


def replica() -> Array | None:
    """Which one this is, where arrays have the rows of one alone: in a region that is manual over
    `replica` (run/step.py). None elsewhere."""
    return jax.lax.axis_index(REPLICA) if _by_replica() else None


def over_replicas(sums: Any) -> Any:
    """Sums over the rows that are here, as those of the whole batch. Their gradient is that of the
    rows which are here: those of all replicas are to be added up, too, once."""
    return _added_up(sums) if _by_replica() else sums


def ways(axes: MeshAxes) -> int:
    """Into how many parts these axes cut a dim, on the mesh that the trace is for."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(shape.get(axis, 1) for axis in axes)


def everywhere(mesh: Mesh, values: np.ndarray) -> jax.Array:
    """Values that every process has alike, on all devices."""
    whole = NamedSharding(mesh, P())
    return jax.make_array_from_callback(values.shape, whole, lambda at: values[at])


def in_parts(rows: Any, parts: int) -> Any:
    """Each array [B, ...] as [parts, B / parts, ...], the batch sharded as before: every device
    cuts its own rows, so that nothing moves."""
    over = batch()

    def local(rows_b: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), rows_b)

    return jax.shard_map(local, in_specs=P(over), out_specs=P(None, over))(rows)


def tokens(*rest: str | None) -> P:
    """The PartitionSpec of an activation [B, L, *rest], L as in context.py."""
    return P(batch(), "context", *rest)


def to_stream(x_BLD: jax.Array) -> jax.Array:
    """The residual stream between blocks: positions over `model`, whose shards would otherwise hold
    copies of it (sequence parallelism: Korthikanti et al., arXiv:2205.05198, section 4.2.2), where
    `stream_is_spread`."""
    spread = stream_is_spread(x_BLD.shape[1], jax.sharding.get_abstract_mesh().shape)
    return jax.reshard(x_BLD, P(batch(), ("context", "model") if spread else "context", None))


def from_stream(x_BLD: jax.Array) -> jax.Array:
    """All positions on every shard of `model`: what blocks and the loss are given."""
    return jax.reshard(x_BLD, tokens(None))


def stream_is_spread(length: int, sizes: Mapping[str, int]) -> bool:
    """Whether the residual stream's positions are spread over `model`, on a mesh of these sizes."""
    return sizes["model"] > 1 and length % (sizes["context"] * sizes["model"]) == 0


def beside(a_BL: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """An array by position, on the devices that have the activation of the position."""
    return jax.reshard(a_BL, P(*jax.typeof(x_BLD).sharding.spec[:2]))


def varying(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays differs, inside of shard_map; none outside."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def vary(a: jax.Array, over: Collection[str]) -> jax.Array:
    """Inside of shard_map: `a` marked as different over these axes too. A cast that is written out
    has a transpose, and custom VJPs need it."""
    return jax.lax.pcast(a, tuple(sorted(set(over) - varying(a))), to="varying")


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside of shard_map: each array marked as different wherever one of them is."""
    over = varying(*arrays)
    return tuple(vary(a, over) for a in arrays)


def platform() -> str:
    """Of the devices that the trace is for: those of the mesh, which may not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:  # no mesh, or one without devices
        name = jax.default_backend()
        kind = jax.devices()[0].device_kind
    else:
        name, kind = device.platform, device.device_kind
    return "an AMD GPU" if name == "gpu" and kind.startswith("AMD") else name


def concrete(abstract_tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of abstract arrays on `mesh`.

    `jax.eval_shape` gives shardings on an AbstractMesh, which orbax refuses.
    """

    def one(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, abstract_tree)


def _by_replica() -> bool:
    return REPLICA in jax.sharding.get_abstract_mesh().manual_axes


@jax.custom_vjp
def _added_up(sums: Any) -> Any:
    return jax.lax.psum(sums, REPLICA)


_added_up.defvjp(lambda sums: (_added_up(sums), None), lambda _, cotangents: (cotangents,))


def _entry(axes: MeshAxes) -> str | MeshAxes | None:
    return axes[0] if len(axes) == 1 else (axes or None)
