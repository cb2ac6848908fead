"""What is kept for the backward pass, by `model.remat`.

    none       everything that autodiff wants
    matmuls    outputs of matmuls that the backward pass needs: queries, keys and values, gate and
               up of feed-forwards and experts; elementwise work is done again
    attention  queries, keys and values; feed-forwards are computed again
    full       inputs of the two halves of a layer
    offload    the same as full, but in the host's memory: on the devices there is one layer at a
               time

All but none also keep attention's outputs and log-sum-exps: as large as an input, and dear to
compute again (cuDNN's are not named, and are). Where the `expert` axis has more than one shard, the
hidden rows of experts are kept by no policy (moe.py); gathered weights and the router's float32
arrays by `none` alone; which experts a row goes to and the order of the rows by all: they are
small.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.chunked import KEPT

# Names of values that a policy may keep.
QKV, HIDDEN, INPUT, CHOICE = "qkv", "feed_forward", "layer_input", "choice"
POLICIES = {
    "full": (KEPT, CHOICE),
    "attention": (KEPT, CHOICE, QKV),
    "matmuls": (KEPT, CHOICE, QKV, HIDDEN),
}


def rematerialised(f: Callable[..., Any], cfg: ModelConfig) -> Callable[..., Any]:
    """`f`, a half of a layer, of which its inputs are kept and what the policy names."""
    if cfg.remat in ("none", "offload"):
        return f
    return jax.checkpoint(
        f, policy=jax.checkpoint_policies.save_only_these_names(*POLICIES[cfg.remat])
    )


def keeps_hidden(cfg: ModelConfig) -> bool:
    """Whether gate and up are there in the backward pass."""
    return cfg.remat == "none" or HIDDEN in POLICIES.get(cfg.remat, ())


def offloaded(f: Callable[..., Any], cfg: ModelConfig) -> Callable[..., Any]:
    """`f`, a whole layer, whose named inputs and attention wait in pinned host memory under
    "offload"; parameters stay where they rest."""
    if cfg.remat != "offload":
        return f
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[CHOICE],
        names_which_can_be_offloaded=[INPUT, KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(f, policy=policy)


def named(x: Any, name: str) -> Any:
    """Arrays under a name that policies know."""
    return jax.tree.map(lambda a: checkpoint_name(a, name), x)
