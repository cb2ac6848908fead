"""The model's account of itself: counts, FLOPs, and a golden file of every parameter.

UPDATE_GOLDEN=1 python -m pytest tests/model/test_cost.py      writes tests/golden/*.txt anew
"""

import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe import config as config_lib
from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import ModelConfig
from jaxmoe.model.cost import cost
from jaxmoe.model.lm import lm_specs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

SMALL = ModelConfig(
    vocab_size=100,
    d_model=10,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=4,
    d_ff=7,
    n_experts=5,
    top_k=2,
)


def test_counted_by_hand() -> None:
    counted = cost(SMALL, seq_len=19)
    assert counted.groups == {
        "embed": 1000,  # 100 * 10
        "attention": 3 * (10 * 24 + 2 * 10 * 8 + 24 * 10),  # q, k and v, out
        "experts": 3 * 5 * 3 * 10 * 7,  # layers * experts * (gate, up, down)
        "router": 3 * 10 * 5,
        "norm": 3 * (10 + 10 + 4 + 4) + 10,
        "head": 1000,
    }
    assert counted.params == 1000 + 1920 + 3150 + 150 + 94 + 1000
    assert counted.params_active == 1920 + 3 * 2 * 3 * 70 + 150 + 94 + 1000
    # Per layer and head, two matmuls of 4 wide over a mean of (19 + 1) / 2 visible positions, two
    # FLOPs each, three passes.
    attention = 3 * 6 * 2 * 4 * 2 * 10 * 3
    assert counted.flops_per_token == 6 * counted.params_active + attention


def test_counts_are_exact_integers_and_of_real_arrays() -> None:
    params = jax.eval_shape(lambda key: spec_lib.init(lm_specs(SMALL), key), jax.random.key(0))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    counted = cost(SMALL, 19)
    assert (
        sizes == counted.params == spec_lib.count(lm_specs(SMALL)) == sum(counted.groups.values())
    )
    huge = config_lib.replace(SMALL, vocab_size=2**20, d_model=2**17, d_ff=2**17, n_experts=2**12)
    counted = cost(huge, 2**20)  # the step's FLOPs on 1e13 tokens are beyond int64
    assert isinstance(counted.flops_per_token, int) and counted.flops_per_token * 10**13 > 2**63


def test_draws_have_the_declared_scale() -> None:
    """std = gain / sqrt(fan_in); norms are ones; another name or seed draws anew."""
    cfg = config_lib.replace(SMALL, d_model=64, n_heads=8, d_head=16, d_ff=96)
    specs = lm_specs(cfg)
    draw = jax.jit(lambda key: spec_lib.init(specs, key))
    params = jax.tree.map(np.asarray, draw(jax.random.key(0)))
    for (name, spec), leaf in zip(
        tree.named_leaves(specs, is_leaf=spec_lib.is_spec), jax.tree.leaves(params), strict=True
    ):
        if spec.init == "ones":
            assert (leaf == 1).all(), name
        else:
            std = spec.gain / math.sqrt(spec.fan_in)
            assert abs(leaf.std() / std - 1) < 0.1 and abs(leaf.mean()) < 0.1 * std, name
    fan_ins = {n: s.fan_in for n, s in tree.named_leaves(specs, is_leaf=spec_lib.is_spec)}
    assert fan_ins["embed_VD"] == 1 and fan_ins["head_DV"] == 64
    assert fan_ins["layers/attention/wo_NHD"] == 8 * 16
    assert fan_ins["layers/moe/wdown_EFD"] == 96
    gate, up = params.layers.moe.wgate_EDF, params.layers.moe.wup_EDF
    assert gate.shape == up.shape and (gate != up).mean() > 0.99
    other = jax.tree.map(np.asarray, draw(jax.random.key(1)))
    assert (other.head_DV != params.head_DV).mean() > 0.99


def describe(config: config_lib.Config) -> str:
    specs = lm_specs(config.model)
    counted = cost(config.model, config.train.seq_len)
    lines = [f"{config.name}: parameters by name, shape, logical axes, size; then the counts"]
    for name, spec in tree.named_leaves(specs, is_leaf=spec_lib.is_spec):
        decay = "decays" if spec.is_matrix else "no decay"
        lines.append(f"{name}  {spec.shape}  {', '.join(spec.axes)}  {spec.size}  {decay}")
    lines += [f"{group} {n}" for group, n in counted.groups.items()]
    lines.append(f"params {counted.params}")
    lines.append(f"params_active {counted.params_active}")
    lines.append(f"flops_per_token {counted.flops_per_token} at {config.train.seq_len} tokens")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["tiny", "quickstart"])
def test_golden(name: str) -> None:
    """Names are checkpoint keys and sizes are promises: neither changes unseen."""
    config = config_lib.load(f"{ROOT / 'configs' / 'quickstart.py'}:{name}")
    path, text = GOLDEN / f"{name}.txt", describe(config)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, (
        f"{path} differs; if that is meant, run UPDATE_GOLDEN=1 python -m pytest {__file__}"
    )
