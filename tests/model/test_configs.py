"""Every config in configs/ type-checks its whole train step, on one device and on 512."""

import importlib.util
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, MeshConfig, replace
from jaxmoe.config_check import check
from jaxmoe.model.lm import lm_specs
from jaxmoe.model.stack import main_segment, segments
from jaxmoe.run.state import abstract_state, make_optimizer
from jaxmoe.run.step import abstract_batch, train_step

CONFIGS = Path(__file__).parents[2] / "configs"


def discover() -> list[str]:
    """FILE:FUNCTION of every public function without arguments that is defined in configs/*.py
    and says that it returns a Config."""
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"discovered_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            returns = inspect.signature(function).return_annotation in (Config, "Config")
            if own and returns and not inspect.signature(function).parameters:
                found.append(f"{path}:{name}")
    return found


FOUND = discover()


def large_mesh(config: Config, n_devices: int = 512) -> MeshConfig:
    """As many ways over each axis as the sizes divide; what is left is data parallel."""

    def ways(*sizes: int, most: int = n_devices) -> int:
        return max(w for w in (2**i for i in range(10)) if w <= most and math.gcd(*sizes) % w == 0)

    m = config.model
    # gcd(0, n) = n: no dense layers. One key/value head is on all shards.
    kv_heads = m.n_kv_heads if m.n_kv_heads > 1 else 0
    latents = (m.mla.q_rank, m.mla.kv_rank) if m.mla else ()
    embed = math.gcd(m.d_model, *latents)  # the dims over `data` and `expert`
    model = ways(m.n_heads, kv_heads, m.d_ff, m.d_ff_dense, m.vocab_size, most=8)
    expert = ways(m.n_experts, embed, most=n_devices // model)
    stage = ways(segments(m)[main_segment(m)].repeats, most=n_devices // model // expert)
    rest = n_devices // model // expert // stage
    data = ways(embed // expert, most=rest)
    return MeshConfig(replica=rest // data, stage=stage, data=data, expert=expert, model=model)


def step_types(config: Config, n_devices: int) -> None:
    mesh = mesh_lib.abstract(config.mesh, n_devices)
    mesh_lib.shardings(lm_specs(config.model), mesh)
    batch = abstract_batch(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config, mesh)
        new, metrics = jax.eval_shape(train_step, state, batch, config)
    jax.tree.map(assert_same_type, state, new)
    assert metrics.sums.total.shape == () and metrics.grad_norm.dtype == jnp.float32


def update_types(config: Config, n_devices: int) -> None:
    """The optimiser alone, from gradients that rest as their parameters do."""
    mesh = mesh_lib.abstract(config.mesh, n_devices)
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config, mesh)
        update = make_optimizer(config).update
        updates, opt_state = jax.eval_shape(update, state.params, state.opt_state, state.params)
    jax.tree.map(assert_same_type, state.params, updates)
    jax.tree.map(assert_same_type, state.opt_state, opt_state)


def assert_same_type(old: jax.ShapeDtypeStruct, new: jax.ShapeDtypeStruct) -> None:
    """The state's type is a fixed point of the step: donation and resume rely on it."""
    assert (old.shape, old.dtype) == (new.shape, new.dtype)
    specs = [x.sharding.spec if x.sharding is not None else jax.P() for x in (old, new)]
    entries = [tuple(s) + (None,) * (len(old.shape) - len(s)) for s in specs]
    assert entries[0] == entries[1], entries


def test_configs_are_found() -> None:
    names = {found.rsplit(":", 1)[1] for found in FOUND}
    assert {"quickstart", "tiny"} <= names
    # The file's own name is what `--config FILE` calls.
    assert {path.stem for path in CONFIGS.glob("*.py")} <= names


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.rsplit(":", 1)[1])
def test_config_is_sound_and_type_checks(found: str) -> None:
    config = config_lib.load(found)
    check(config)
    assert config_lib.from_json(config_lib.json.dumps(config_lib.as_dict(config))) == config
    # A device's slots are counted in int32, so one device cannot have a cluster's batch.
    few = replace(config.train, batch_size=min(config.train.batch_size, 8))
    step_types(replace(config, mesh=MeshConfig(), train=few), 1)
    mesh = large_mesh(config)
    assert max(mesh.expert, mesh.data, mesh.stage) > 1
    ways = int(np.prod([getattr(mesh, axis) for axis in mesh_lib.BATCH]))
    train = replace(config.train, batch_size=2 * ways)
    large = replace(config, mesh=mesh, train=train)
    check(large)
    step_types(large, 512)
    for name in ("adamw", "muon"):
        update_types(replace(large, optim=replace(config.optim, name=name)), 512)


def test_gpt4_type_checks_on_its_own_mesh() -> None:
    """Its batch on 24,576 devices, and a mesh that has none of 1 on the axes that are built."""
    config = config_lib.load(str(CONFIGS / "gpt4.py"))
    check(config)
    sizes = mesh_lib.sizes(config.mesh, 24_576)
    assert all(sizes[axis] > 1 for axis in ("replica", "data", "expert", "model")), sizes
    step_types(config, 24_576)
