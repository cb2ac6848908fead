"""The train step and the evaluation step: pure functions of (state, batch, config)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxmoe.config import Config
from jaxmoe.kernels.cross_entropy import LossSums
from jaxmoe.model.lm import Lm, LmStats, lm_loss, move_balance_bias
from jaxmoe.model.router import RouterStats
from jaxmoe.run.state import TrainState, make_optimizer

Array = jax.Array


@struct.dataclass
class Batch:
    """Sequences with one token more than is predicted from: targets are the same, shifted."""

    tokens_BL: Any  # int32 [B, L + 1]
    weights_BL: Any  # float32 [B, L]; 0 leaves a target out
    documents_BL: Any = None  # int32 [B, L], 0 for padding; None: a row is one document

    def inputs(self) -> Array:
        return self.tokens_BL[:, :-1]

    def targets(self) -> Array:
        return self.tokens_BL[:, 1:]


@struct.dataclass
class StepMetrics:
    """Of one step; stays on the device until the loop reads it, a step late."""

    sums: LossSums
    router: RouterStats | None  # of all layers with experts, on a leading dim X
    mtp_nll: Array  # [n_mtp], nats per token
    grad_norm: Array  # before clipping


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def train_step(state: TrainState, batch: Batch, config: Config) -> tuple[TrainState, StepMetrics]:
    """One update. The state is donated: its buffers are the new state's."""

    key = None
    if config.model.router.jitter:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss(params: Any) -> tuple[Array, tuple[LossSums, LmStats]]:
        sums, stats = _loss(params, batch, config, key)
        return sums.total / sums.weight, (sums, stats)

    grads, (sums, stats) = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    params = move_balance_bias(params, stats, config.model)
    new = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    return new, StepMetrics(
        sums=sums, router=stats.router, mtp_nll=stats.mtp_nll, grad_norm=optax.tree.norm(grads)
    )


@partial(jax.jit, static_argnums=2)
def eval_step(params: Lm, batch: Batch, config: Config) -> LossSums:
    """Loss sums of a held-out batch; add them up, then divide."""
    return _loss(params, batch, config, None)[0]


def _loss(params: Any, batch: Batch, config: Config, key: Any) -> tuple[LossSums, LmStats]:
    return lm_loss(
        params,
        batch.inputs(),
        batch.targets(),
        batch.weights_BL,
        config.model,
        documents_BL=batch.documents_BL,
        key=key,
        layout=config.mesh,
    )


def add(a: LossSums, b: LossSums) -> LossSums:
    return jax.tree.map(jnp.add, a, b)
