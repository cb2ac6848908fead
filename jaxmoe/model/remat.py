"""What is kept for the backward pass, by `model.remat`."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.config import ModelConfig


def rematerialised(f: Callable[..., Any], cfg: ModelConfig) -> Callable[..., Any]:
    """`f`, of which only the inputs are kept under "full"."""
    return jax.checkpoint(f) if cfg.remat == "full" else f
