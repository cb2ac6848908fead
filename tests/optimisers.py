"""A few parameters with all kinds of dims, and updates of them by any optimiser on any mesh."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from meshes import on

from jaxmoe import mesh as mesh_lib
from jaxmoe import spec as spec_lib
from jaxmoe.config import OptimConfig
from jaxmoe.optim import optimizer
from jaxmoe.run.state import TrainState
from jaxmoe.spec import Spec

STEPS = 20
SPECS = {
    "experts": Spec(
        shape=(2, 4, 16, 8),
        axes=("layers", "experts", "expert_embed", "ff"),
        inputs=("expert_embed",),
    ),
    "heads": Spec(
        shape=(3, 16, 4, 64), axes=("layers", "embed", "heads", "head"), inputs=("embed",)
    ),
    "embed": Spec(shape=(12, 16), axes=("vocab", "embed")),
    "norm": Spec(shape=(3, 16), axes=("layers", "norm"), init="ones"),
    "bias": Spec(shape=(3, 4, 64), axes=("layers", "heads", "head"), init="zeros"),
}
PLAIN = OptimConfig(lr=0.1, clip=1e9, warmup_steps=0, schedule="constant", weight_decay=0.3)
CASES = {
    "adamw": OptimConfig(lr=0.1, clip=30, warmup_steps=2),
    "adamw bfloat16": OptimConfig(lr=0.1, clip=30, warmup_steps=2, moments="bfloat16"),
    "adamw int8": OptimConfig(lr=0.1, clip=30, warmup_steps=2, moments="int8"),
    "muon": OptimConfig(name="muon", lr=0.1, clip=30, warmup_steps=2),
    "muon int8": OptimConfig(name="muon", lr=0.1, clip=30, warmup_steps=2, moments="int8"),
    "adafactor": OptimConfig(name="adafactor", lr=0.1, clip=30, warmup_steps=2),
}


def draw(seed: int) -> Any:
    """Gradients or parameters, float32: rows of very different sizes."""
    rng = np.random.default_rng(seed)

    def one(spec: Spec) -> np.ndarray:
        sizes = 10.0 ** rng.uniform(-2, 1, (*spec.shape[:-1], 1))
        return (sizes * rng.normal(size=spec.shape)).astype(np.float32)

    return spec_lib.map_specs(one, SPECS)


def placed(mesh: Any, arrays: Any) -> Any:
    return jax.device_put(arrays, mesh_lib.shardings(SPECS, mesh))


@functools.cache
def compiled(cfg: OptimConfig) -> Any:
    """(state, gradients) -> the state one update later, and the update."""
    tx = optimizer(cfg, SPECS, STEPS)

    @jax.jit
    def step(state: TrainState, grads: Any) -> tuple[TrainState, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), updates

    return step


def fresh(cfg: OptimConfig, mesh: Any) -> TrainState:
    with jax.set_mesh(mesh):
        params = placed(mesh, draw(0))
        opt_state = jax.jit(optimizer(cfg, SPECS, STEPS).init)(params)
        return TrainState(
            step=jax.device_put(np.int32(0), jax.P()), params=params, opt_state=opt_state
        )


def advance(cfg: OptimConfig, mesh: Any, state: TrainState, seeds: range) -> TrainState:
    with jax.set_mesh(mesh):
        for seed in seeds:
            state, _ = compiled(cfg)(state, placed(mesh, draw(seed)))
    return state


@functools.cache
def run(cfg: OptimConfig, n: int = 4, **axes: int) -> TrainState:
    """After n updates on a mesh."""
    mesh = on(**axes)
    return advance(cfg, mesh, fresh(cfg, mesh), range(1, 1 + n))
