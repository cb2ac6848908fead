"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout, and its scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import RopeConfig

Array = jax.Array
Turns = tuple[Array, Array]  # float32 [b, L, H / 2] each


def rope(x_BLnH: Array, turns: Turns) -> Array:
    """Turns each pair (h, h + H/2) by its angle; float32 inside. n: any heads."""
    cos, sin = (a_bLh[:, :, None, :] for a_bLh in turns)
    x1_BLnh, x2_BLnh = jnp.split(x_BLnH.astype(jnp.float32), 2, axis=-1)
    turned = (x1_BLnh * cos - x2_BLnh * sin, x2_BLnh * cos + x1_BLnh * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BLnH.dtype)


def make_turns(positions_bL: Array, cfg: RopeConfig, width: int) -> Turns:
    """Cosine and sine of position * frequency; once for all layers, since a cosine costs XLA CPU
    more than the rest of `rope` (LOG.md).

    Args:
        positions_bL: int32, b = B, or 1 for the same positions in every row.
        width: of a head's rotary part.
    """
    frequency_h, factor = frequencies(cfg, width)
    angle_bLh = positions_bL.astype(jnp.float32)[..., None] * frequency_h[None, None, :]
    return factor * jnp.cos(angle_bLh), factor * jnp.sin(angle_bLh)


def frequencies(cfg: RopeConfig, width: int) -> tuple[np.ndarray, float]:
    """float32 [width / 2]: radians a position of each pair; and what cos and sin are multiplied by.

    linear: Chen et al., arXiv:2306.15595. ntk: the base grows so that the slowest pair is
    interpolated in full and the fastest not at all. yarn: Peng et al., arXiv:2309.00071, section 3.
    llama3: by wavelength against the original length, smooth in between (Llama 3.1).
    """
    exponent_h = np.arange(width // 2, dtype=np.float64) / (width // 2)
    theta = ntk_theta(cfg, width) if cfg.scaling == "ntk" else cfg.theta
    plain_h = theta**-exponent_h
    if cfg.scaling == "linear":
        plain_h = plain_h / cfg.factor
    elif cfg.scaling == "yarn":
        keep_h = _yarn_keep(cfg, width)
        plain_h = plain_h * (keep_h + (1 - keep_h) / cfg.factor)
    elif cfg.scaling == "llama3":
        turns_h = cfg.original_length * plain_h / (2 * math.pi)
        low, high = cfg.low_freq_factor, cfg.high_freq_factor
        keep_h = np.clip((turns_h - low) / (high - low), 0, 1)
        plain_h = plain_h * (keep_h + (1 - keep_h) / cfg.factor)
    return plain_h.astype(np.float32), _attention_factor(cfg)


def ntk_theta(cfg: RopeConfig, width: int) -> float:
    """The base under which unscaled frequencies are those of NTK scaling."""
    return cfg.theta * cfg.factor ** (width / (width - 2))


def score_scale(cfg: RopeConfig, width: int) -> float:
    """What scores are multiplied by: 1 / sqrt(width), and DeepSeek's correction under yarn."""
    correction = 1.0
    if cfg.scaling == "yarn" and cfg.mscale_all_dim:
        correction = _mscale(cfg.factor, cfg.mscale_all_dim) ** 2
    return correction / math.sqrt(width)


def _yarn_keep(cfg: RopeConfig, width: int) -> np.ndarray:
    """1 for pairs that keep their frequency, 0 for those that are interpolated, a ramp between."""

    def pair_that_turns(times: float) -> float:
        turns = cfg.original_length / (times * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(cfg.theta))

    low, high = pair_that_turns(cfg.beta_fast), pair_that_turns(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp_h = (np.arange(width // 2) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp_h, 0, 1)


def _attention_factor(cfg: RopeConfig) -> float:
    if cfg.scaling != "yarn":
        return 1.0
    if cfg.attention_factor is not None:
        return cfg.attention_factor
    if cfg.mscale and cfg.mscale_all_dim:
        return _mscale(cfg.factor, cfg.mscale) / _mscale(cfg.factor, cfg.mscale_all_dim)
    return _mscale(cfg.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    """YaRN, section 3.4: attention is sharpened as the length grows."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
