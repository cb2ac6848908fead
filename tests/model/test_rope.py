"""Rotary positions beyond the length trained on: every scaling by its paper's own formula."""

import math
from typing import Any

import jax
import numpy as np
import pytest
import reference
from reference import assert_close

from jaxmoe.config import RopeConfig, replace
from jaxmoe.model.rope import frequencies, make_turns, rope, score_scale

WIDTH = 24
YARN = RopeConfig(
    theta=1000.0, scaling="yarn", factor=8.0, original_length=64, beta_fast=5.0, beta_slow=0.5
)
LLAMA = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_length=8192)
CASES = {
    "none": RopeConfig(theta=1000.0),
    "linear": RopeConfig(theta=1000.0, scaling="linear", factor=4.0),
    "ntk": RopeConfig(theta=1000.0, scaling="ntk", factor=4.0),
    "yarn": YARN,
    "yarn between pairs": replace(YARN, truncate=False),
    "yarn, all pairs in the ramp": replace(YARN, beta_fast=1e4, beta_slow=1e-4),
    "yarn, no ramp": replace(YARN, beta_fast=1.0, beta_slow=1.0, truncate=False),
    "yarn, a factor of its own": replace(YARN, attention_factor=0.7),
    "yarn as DeepSeek has it": replace(YARN, mscale=0.7, mscale_all_dim=1.3),
    "yarn, only of scores": replace(YARN, mscale_all_dim=0.8),
    "llama3": LLAMA,
    "llama3, its ramp narrow": replace(LLAMA, low_freq_factor=2.0, high_freq_factor=2.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_scaling_is_its_formula(name: str) -> None:
    """Frequencies, the factor of rotated parts, the scale of scores; and rope as it uses them."""
    cfg = CASES[name]
    got, factor = frequencies(cfg, WIDTH)
    wanted = reference.frequencies(cfg, WIDTH)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    of_parts, of_scores = reference.sharpening(cfg)
    assert factor == pytest.approx(of_parts) and got.dtype == np.float32
    assert score_scale(cfg, WIDTH) == pytest.approx(of_scores / math.sqrt(WIDTH))
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, WIDTH))
    positions = np.array([[0, 1, 2, 0, 1], [7, 30, 2, 90, 0]], np.int32)
    turned = rope(x, make_turns(jax.numpy.asarray(positions), cfg, WIDTH))
    assert_close(turned, reference.rope(x, positions, cfg))
    # Position 0 only has the factor, wherever in the row it stands.
    for row, at in ((0, 0), (0, 3), (1, 4)):
        np.testing.assert_allclose(turned[row, at], factor * np.asarray(x)[row, at], rtol=1e-6)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_leaves_everything_as_it_was(scaling: Any) -> None:
    cfg = RopeConfig(theta=1000.0, scaling=scaling, original_length=64, mscale=0.7)
    for one in (cfg, replace(cfg, mscale_all_dim=0.7)):
        plain, factor = frequencies(CASES["none"], WIDTH)
        np.testing.assert_array_equal(frequencies(one, WIDTH)[0], plain)
        assert frequencies(one, WIDTH)[1] == factor == 1
        assert score_scale(one, WIDTH) == 1 / math.sqrt(WIDTH)


def test_what_each_scaling_promises() -> None:
    """Fast pairs stay, slow ones are interpolated in full, between them in between."""
    plain, _ = frequencies(CASES["none"], WIDTH)
    assert_close(frequencies(CASES["linear"], WIDTH)[0], plain / 4)
    ntk, _ = frequencies(CASES["ntk"], WIDTH)
    assert ntk[0] == plain[0] and ntk[-1] == pytest.approx(plain[-1] / 4)
    assert (np.diff(ntk / plain) < 0).all()
    turns = 64 * plain / (2 * math.pi)
    for cfg in (YARN, replace(YARN, truncate=False)):
        ratio = frequencies(cfg, WIDTH)[0] / plain
        assert (np.diff(ratio) <= 1e-6).all()
        np.testing.assert_allclose(ratio[turns > 5 * 2], 1, rtol=1e-6)
        np.testing.assert_allclose(ratio[turns < 0.5 / 2], 1 / 8, rtol=1e-6)
        assert ((ratio > 0.13) & (ratio < 0.99)).sum() >= 3
    plain, _ = frequencies(replace(LLAMA, scaling="none", factor=1.0), 128)
    ratio = frequencies(LLAMA, 128)[0] / plain
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)
    assert ((ratio > 0.13) & (ratio < 0.99)).sum() >= 5


def test_published_factors() -> None:
    """gpt-oss: factor 32, no mscale. DeepSeek-V3: factor 40, both mscales 1, width 192."""
    gpt_oss = RopeConfig(theta=150_000.0, scaling="yarn", factor=32.0, original_length=4096)
    assert frequencies(gpt_oss, 64)[1] == pytest.approx(1.3465735902799727)
    assert score_scale(gpt_oss, 64) == pytest.approx(0.125)
    deepseek = RopeConfig(
        scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert frequencies(deepseek, 64)[1] == 1
    assert score_scale(deepseek, 192) == pytest.approx(0.1352337788608801)
