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
from jaxmoe.model.lm import lm_specs
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import Batch, train_step

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
    model = ways(m.n_heads, m.n_kv_heads, m.d_ff, m.vocab_size, most=8)
    expert = ways(m.n_experts, m.d_model, most=n_devices // model)
    data = ways(m.d_model // expert, most=n_devices // model // expert)
    return MeshConfig(
        replica=n_devices // model // expert // data, data=data, expert=expert, model=model
    )


def step_types(config: Config, n_devices: int) -> None:
    mesh = mesh_lib.abstract(config.mesh, n_devices)
    mesh_lib.shardings(lm_specs(config.model), mesh)
    mesh_lib.check_batch(mesh, "train.batch_size", config.train.batch_size)
    rows, b, length = jax.P(mesh_lib.BATCH), config.train.batch_size, config.train.seq_len
    sharding = jax.NamedSharding(mesh, rows)
    batch = Batch(
        tokens_BL=jax.ShapeDtypeStruct((b, length + 1), jnp.int32, sharding=sharding),
        weights_BL=jax.ShapeDtypeStruct((b, length), jnp.float32, sharding=sharding),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config, mesh)
        new, metrics = jax.eval_shape(train_step, state, batch, config)

    def same(old: jax.ShapeDtypeStruct, new: jax.ShapeDtypeStruct) -> None:
        """The state's type is a fixed point of the step: donation and resume rely on it."""
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        specs = [x.sharding.spec if x.sharding is not None else jax.P() for x in (old, new)]
        entries = [tuple(s) + (None,) * (len(old.shape) - len(s)) for s in specs]
        assert entries[0] == entries[1], entries

    jax.tree.map(same, state, new)
    assert metrics.sums.total.shape == () and metrics.grad_norm.dtype == jnp.float32


def test_configs_are_found() -> None:
    names = {found.rsplit(":", 1)[1] for found in FOUND}
    assert {"quickstart", "tiny"} <= names


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.rsplit(":", 1)[1])
def test_config_is_sound_and_type_checks(found: str) -> None:
    config = config_lib.load(found)
    config_lib.check(config)
    assert config_lib.from_json(config_lib.json.dumps(config_lib.as_dict(config))) == config
    step_types(replace(config, mesh=MeshConfig()), 1)
    mesh = large_mesh(config)
    assert max(mesh.expert, mesh.data) > 1
    ways = int(np.prod([getattr(mesh, axis) for axis in mesh_lib.BATCH]))
    train = replace(config.train, batch_size=2 * ways)
    for name in ("adamw", "muon"):
        optim = replace(config.optim, name=name)
        step_types(replace(config, mesh=mesh, train=train, optim=optim), 512)
