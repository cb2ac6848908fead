"""The mesh: sizes that must fit, with errors that give both numbers, and the rule tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from meshes import on

from jaxmoe import mesh as mesh_lib
from jaxmoe import spec as spec_lib
from jaxmoe.config import Config, MeshConfig, ModelConfig
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, BATCH, COMPUTE, STORE, sizes
from jaxmoe.model.lm import lm_specs
from jaxmoe.run.state import abstract_state
from jaxmoe.spec import Spec

MODEL = ModelConfig(
    vocab_size=42, d_model=24, n_heads=10, n_kv_heads=2, d_head=6, d_ff=14, n_experts=16, top_k=3
)


def test_all_axes_exist_and_data_takes_what_is_left() -> None:
    assert tuple(sizes(MeshConfig(), 1)) == AXES
    assert sizes(MeshConfig(), 8)["data"] == 8
    got = sizes(MeshConfig(replica=2, expert=3, model=4), 120)
    assert got == dict(zip(AXES, (2, 1, 5, 1, 3, 4), strict=True))


@pytest.mark.parametrize(
    ("config", "n", "parts"),
    [
        (MeshConfig(data=4), 8, ["data=4", "needs 4 devices", "there are 8"]),
        (MeshConfig(data=2, expert=4, model=2), 8, ["needs 16 devices", "there are 8"]),
        (MeshConfig(expert=3), 8, ["expert=3", "needs 6 devices", "there are 8"]),
        (MeshConfig(model=16), 8, ["model=16", "needs 16 devices", "there are 8"]),
    ],
)
def test_a_product_that_is_not_the_device_count(
    config: MeshConfig, n: int, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        sizes(config, n)
    for part in parts:
        assert part in str(caught.value)


def test_build_takes_every_device_or_fails() -> None:
    mesh = mesh_lib.build(MeshConfig(expert=2))
    assert isinstance(mesh, Mesh) and mesh.shape["data"] == 4 and mesh.size == 8
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    with pytest.raises(UserError, match="needs 4 devices, but there are 8"):
        mesh_lib.build(MeshConfig(data=4))  # jax.make_mesh would take four of the eight
    abstract = mesh_lib.abstract(MeshConfig(model=4), 24_576)
    assert isinstance(abstract, AbstractMesh) and abstract.size == 24_576


def test_devices_wanted() -> None:
    assert mesh_lib.devices_wanted(MeshConfig(), 1) == 1
    assert mesh_lib.devices_wanted(MeshConfig(data=2, expert=4), 1) == 8
    assert mesh_lib.devices_wanted(MeshConfig(data=2, expert=4), 2) == 4
    assert mesh_lib.devices_wanted(MeshConfig(expert=4, emulate=6), 1) == 6


def test_no_dim_of_a_parameter_uses_an_axis_twice_nor_the_batchs_in_compute() -> None:
    assert set(STORE) == set(COMPUTE)
    for spec in jax.tree.leaves(lm_specs(MODEL), is_leaf=spec_lib.is_spec):
        for rules in (STORE, COMPUTE):
            used = [axis for dim in spec.axes for axis in rules[dim]]
            assert len(used) == len(set(used)), spec
        compute = {axis for dim in spec.axes if dim != "layers" for axis in COMPUTE[dim]}
        # Each batch shard must see the whole weight; only experts stay apart, where tokens travel,
        # and gather what they need by themselves.
        assert not compute & {"replica", "stage"}, spec
        assert "expert" not in compute or "experts" in spec.axes
        assert not compute & {"data", "context"} or "expert_embed" in spec.axes


def test_partition() -> None:
    specs = lm_specs(MODEL)
    assert mesh_lib.partition(specs.head_DV, STORE) == P(("data", "expert", "context"), "model")
    assert mesh_lib.partition(specs.head_DV, COMPUTE) == P(None, "model")
    assert mesh_lib.partition(specs.embed_VD, STORE) == P("model", ("data", "expert", "context"))
    gate = specs.layers[0][0].ffn.experts.wgate_EDF
    fsdp = ("data", "expert", "context")
    assert mesh_lib.partition(gate, STORE) == P("stage", "expert", ("data", "context"), "model")
    assert mesh_lib.partition(gate, COMPUTE) == mesh_lib.partition(gate, STORE)
    query = specs.layers[0][0].attention.wq_DNH
    assert mesh_lib.partition(query, STORE) == P("stage", fsdp, "model", None)
    assert mesh_lib.partition(query, COMPUTE) == P("stage", None, "model", None)


@pytest.mark.parametrize(
    ("axes", "n", "parts"),
    [
        ({"data": 5}, 5, ["embed_VD", "embed dim of 24", "data=5 x expert=1"]),
        ({"data": 4, "expert": 4}, 16, ["embed_VD", "data=4 x expert=4"]),
        (
            {"expert": 3, "data": 1},
            3,
            ["layers/0/0/ffn/experts/wgate_EDF", "experts dim of 16", "expert=3"],
        ),
        ({"model": 7, "data": 1}, 7, ["layers/0/0/attention/wq_DNH", "heads dim of 10", "model=7"]),
    ],
)
def test_a_dim_that_does_not_divide_names_the_parameter(
    axes: dict[str, int], n: int, parts: list[str]
) -> None:
    mesh = mesh_lib.abstract(MeshConfig(**axes), n)
    with pytest.raises(UserError) as caught:
        mesh_lib.shardings(lm_specs(MODEL), mesh)
    for part in parts:
        assert part in str(caught.value)


def test_a_batch_that_does_not_divide() -> None:
    mesh = mesh_lib.abstract(MeshConfig(replica=2, data=3, expert=4, model=5), 120)
    mesh_lib.check_batch(mesh, "train.batch_size", 48)
    with pytest.raises(UserError, match=r"eval\.batch_size=36 .*replica=2 x data=3 x expert=4"):
        mesh_lib.check_batch(mesh, "eval.batch_size", 36)


def test_gather_casts_and_gathers_what_the_layer_uses() -> None:
    """FSDP's axes go, tensor and expert axes stay; norms and router stay float32."""
    mesh = on(data=2, expert=2, model=2)
    specs = {
        "gate": Spec(shape=(8, 10), axes=("embed", "ff")),
        "expert": Spec(shape=(4, 6, 10), axes=("experts", "expert_embed", "ff")),
        "router": Spec(shape=(12, 4), axes=("embed", "router"), cast=False),
    }
    rng = np.random.default_rng(0)
    values = spec_lib.map_specs(lambda s: rng.normal(size=s.shape).astype(np.float32), specs)
    with jax.set_mesh(mesh):
        params = jax.device_put(values, mesh_lib.shardings(specs, mesh))
        assert params["gate"].addressable_shards[0].data.shape == (2, 5)
        assert params["expert"].addressable_shards[0].data.shape == (2, 3, 5)
        assert params["router"].addressable_shards[0].data.shape == (3, 4)
        used = jax.jit(lambda p: mesh_lib.gather(p, specs, jnp.dtype(jnp.bfloat16)))(params)
    assert used["gate"].dtype == jnp.bfloat16 and used["router"].dtype == jnp.float32
    assert used["gate"].addressable_shards[0].data.shape == (8, 5)
    assert used["expert"].addressable_shards[0].data.shape == (2, 3, 5)
    assert used["router"].addressable_shards[0].data.shape == (12, 4)
    np.testing.assert_array_equal(used["router"], values["router"])
    np.testing.assert_array_equal(used["gate"], values["gate"].astype(jnp.bfloat16))


def test_global_array_asks_for_each_row_of_its_shards() -> None:
    mesh = on(replica=2, data=2, model=2)
    whole, asked = np.arange(24).reshape(8, 3), []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return whole[start:stop]

    got: Any = mesh_lib.global_array(mesh, (8, 3), rows)
    np.testing.assert_array_equal(got, whole)
    assert set(asked) == {(0, 2), (2, 4), (4, 6), (6, 8)}
    assert got.sharding.spec[0] == BATCH


def test_abstract_state_is_concrete_enough_for_a_checkpoint() -> None:
    """Real NamedShardings on the mesh itself, for moments as for parameters."""
    mesh = on(data=2, expert=2, model=2)
    state = abstract_state(Config(model=MODEL), mesh)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh is mesh
