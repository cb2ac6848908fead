"""What is kept for the backward pass, by `model.remat`."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.config import ModelConfig
from jaxmoe.kernels.chunked import KEPT


def rematerialised(f: Callable[..., Any], cfg: ModelConfig) -> Callable[..., Any]:
    """`f`, of which under "full" only the inputs are kept, and the outputs of attention with their
    log-sum-exps: as large as an input, and dear to compute again."""
    if cfg.remat == "none":
        return f
    return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
