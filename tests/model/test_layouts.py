"""The layout is no part of the result: every mesh trains to the same losses and gradients.

The whole train step runs on each mesh from the same parameters and batches. One device is held
against the plain reference, every other mesh against one device.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest
import reference
from meshes import hlo, on, put
from reference import assert_close

from jaxmoe import tree
from jaxmoe.config import Config, ModelConfig, OptimConfig, RouterConfig, TrainConfig, replace
from jaxmoe.run.state import TrainState, abstract_state, init_state
from jaxmoe.run.step import Batch, train_step

# Every dim has a size of its own, so that swapped letters cannot pass.
MODEL = ModelConfig(
    vocab_size=42,
    d_model=24,
    n_layers=5,
    n_heads=10,
    n_kv_heads=2,
    d_head=6,
    d_ff=14,
    n_experts=16,
    top_k=3,
    loss_chunk=2,  # positions of a sequence on one device: context8 has two
    # Large enough that a wrong auxiliary loss shows.
    router=RouterConfig(load_balance_coef=0.1, z_coef=0.05),
    z_loss_coef=0.01,
)
B, L, STEPS = 8, 16, 6
ADAMW = Config(
    model=MODEL,
    optim=OptimConfig(warmup_steps=2, clip=0.5),
    train=TrainConfig(steps=STEPS, batch_size=B, seq_len=L),
)
MUON = replace(ADAMW, optim=replace(ADAMW.optim, name="muon"))
CONFIGS = {"adamw": ADAMW, "muon": MUON}

# Names of meshes are the sizes of their axes.
LAYOUTS = {
    "data8": {"data": 8},
    "expert8": {"expert": 8},
    "data4_model2": {"data": 4, "model": 2},
    "data2_expert2_model2": {"data": 2, "expert": 2, "model": 2},
    "replica2_data2_expert2": {"replica": 2, "data": 2, "expert": 2},
    "expert4_model2": {"expert": 4, "model": 2},
    "replica2_expert2_model2": {"replica": 2, "expert": 2, "model": 2},
    "context8": {"context": 8},
    "data2_context2_model2": {"data": 2, "context": 2, "model": 2},
    "context4_expert2": {"context": 4, "expert": 2},
    "replica2_context2_expert2": {"replica": 2, "context": 2, "expert": 2},
    "context2_expert2_model2": {"context": 2, "expert": 2, "model": 2},
}
MUON_LAYOUTS = ("data8", "data2_expert2_model2", "data2_context2_model2")
# This one also keeps its activations: rematerialisation must not change a number either.
WITHOUT_REMAT = "replica2_expert2_model2"
# Here experts have equal slots, as off CPU; all others loop over blocks of rows.
BATCHED = ("replica2_data2_expert2", "expert4_model2", "context4_expert2")
# Others than what "auto" takes at these sizes, which is all_gather.
EXCHANGES = {"expert8": "ragged", "data2_expert2_model2": "all_to_all"}
EXCHANGES |= {"context2_expert2_model2": "all_to_all"}
# Keys travel around here; they are gathered on the other meshes, as "auto" has it at these sizes.
RINGS = ("context8", "context2_expert2_model2")


@dataclass(frozen=True)
class Run:
    """What a few steps on a mesh left behind."""

    losses: np.ndarray  # [STEPS], of the whole objective
    balance: np.ndarray  # [STEPS, R]
    first_norm: float  # of the first gradient
    first: Any  # the first step's gradients, clipped, times 1 - beta1: Adam's first moment
    state: TrainState
    hlo: str


@functools.cache
def batches() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (STEPS, B, L + 1)).astype(np.int32)
    # Uneven over rows, so that a mean of shards' means is not the mean.
    weights = rng.choice([0.0, 0.5, 1.0], (STEPS, B, L), p=[0.3, 0.3, 0.4]).astype(np.float32)
    weights[:, 0] = 0
    return tokens, weights


@functools.cache
def start(optimizer: str) -> Any:
    if optimizer == "adamw":
        return jax.tree.map(np.asarray, init_state(ADAMW, on()))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_state(MUON, on()))
    return zeros.replace(params=start("adamw").params)


@functools.cache
def run(optimizer: str, layout: str) -> Run:
    config = CONFIGS[optimizer]
    if layout == WITHOUT_REMAT:
        config = replace(config, model=replace(MODEL, remat="none"))
    if layout in BATCHED:
        config = replace(config, model=replace(MODEL, expert_path="batched"))
    if layout in EXCHANGES:
        config = replace(config, model=replace(config.model, expert_exchange=EXCHANGES[layout]))
    if layout in RINGS:
        config = replace(config, model=replace(config.model, context_attention="ring"))
    mesh = on(**LAYOUTS.get(layout, {}))
    losses, balance, norms, first = [], [], [], None
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh))
        state = jax.device_put(start(optimizer), placed)
        given = [Batch(*put(mesh, pair)) for pair in zip(*batches(), strict=True)]
        compiled = train_step.lower(state, given[0], config).compile()
        for batch in given:
            state, metrics = compiled(state, batch)
            losses.append(metrics.sums.total / metrics.sums.weight)
            balance.append(metrics.router.load_balance)
            norms.append(metrics.grad_norm)
            if first is None and optimizer == "adamw":
                first = jax.tree.map(np.array, optax.tree.get(state.opt_state, "mu"))
    return Run(
        losses=np.array([float(x) for x in losses]),
        balance=np.array([np.asarray(x) for x in balance]),
        first_norm=float(norms[0]),
        first=first,
        state=state,
        hlo=hlo(compiled),
    )


def test_one_device_is_the_plain_model() -> None:
    """Loss, and the gradient of every parameter, of the whole model against the reference."""
    tokens, weights = batches()
    params = start("adamw").params
    value, grads = jax.jit(jax.value_and_grad(reference.loss), static_argnums=3)(
        params, tokens[0], weights[0], MODEL
    )
    got = run("adamw", "one")
    assert_close(got.losses[0], value, name="loss")
    norm = float(optax.tree.norm(grads))
    assert_close(got.first_norm, norm, name="norm")
    clip = min(1.0, ADAMW.optim.clip / norm)
    assert clip < 1  # or clipping would not be seen
    wanted = dict(tree.named_leaves(grads))
    for name, moment in tree.named_leaves(got.first):
        assert_close(moment / (1 - ADAMW.optim.beta1) / clip, wanted[name], name=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_loss_on_every_mesh(layout: str) -> None:
    one, got = run("adamw", "one"), run("adamw", layout)
    assert np.ptp(one.losses) > 0.05, "it does not train, so equality says little"
    np.testing.assert_allclose(got.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(got.balance, one.balance, rtol=1e-5)


@pytest.mark.parametrize("layout", MUON_LAYOUTS)
def test_same_loss_on_every_mesh_with_muon(layout: str) -> None:
    one, got = run("muon", "one"), run("muon", layout)
    assert abs(one.losses[-1] - run("adamw", "one").losses[-1]) > 1e-3  # it is another optimiser
    np.testing.assert_allclose(got.losses, one.losses, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_gradients_on_every_mesh(layout: str) -> None:
    wanted = dict(tree.named_leaves(run("adamw", "one").first))
    assert len(wanted) == 15
    for name, moment in tree.named_leaves(run("adamw", layout).first):
        assert_close(moment, wanted[name], name=name)


@pytest.mark.parametrize("optimizer", CONFIGS)
def test_the_state_is_spread(optimizer: str) -> None:
    """Experts over `expert`, heads and ff over `model`, FSDP over `data`; the moments likewise."""
    m = MODEL
    d4, n, f, e = m.d_model // 4, m.n_heads // 2, m.d_ff // 2, m.n_experts // 2
    r, h, d2, v = m.n_layers, m.d_head, m.d_model // 2, m.vocab_size // 2
    parts = {
        "embed_VD": (v, d4),
        "layers/0/0/attention_norm_D": (r, m.d_model),
        "layers/0/0/attention/wq_DNH": (r, d4, n, h),
        "layers/0/0/attention/wk_DKH": (r, d4, m.n_kv_heads // 2, h),
        "layers/0/0/attention/wv_DKH": (r, d4, m.n_kv_heads // 2, h),
        "layers/0/0/attention/wo_NHD": (r, n, h, d4),
        "layers/0/0/attention/q_norm": (r, h),
        "layers/0/0/attention/k_norm": (r, h),
        "layers/0/0/ffn_norm_D": (r, m.d_model),
        "layers/0/0/ffn/router/w_DE": (r, d4, m.n_experts),
        "layers/0/0/ffn/experts/wgate_EDF": (r, e, d2, f),
        "layers/0/0/ffn/experts/wup_EDF": (r, e, d2, f),
        "layers/0/0/ffn/experts/wdown_EFD": (r, e, f, d2),
        "final_norm_D": (m.d_model,),
        "head_DV": (d4, v),
    }
    state = run(optimizer, "data2_expert2_model2").state
    moments = 0
    for path, array in tree.named_leaves(state):
        name = next((n for n in parts if path.endswith(n)), None)
        if name is None:
            assert array.ndim == 0, path
            continue
        moments += not path.startswith("params")
        for shard in array.addressable_shards:
            assert shard.data.shape == parts[name], path
        held = {str(shard.index) for shard in array.addressable_shards}
        assert len(held) == array.size // int(np.prod(parts[name])), path
    # AdamW: two for each. Muon: one for the 8 matrices, two for the other 7.
    assert moments == (30 if optimizer == "adamw" else 22)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_to_all_where_experts_are_spread_and_go_that_way_only(layout: str) -> None:
    found = re.findall(r" all-to-all(?:-start)?\(", run("adamw", layout).hlo)
    assert bool(found) == (layout in BATCHED or EXCHANGES.get(layout) == "all_to_all")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "context" in name])
def test_keys_travel_around_where_they_are_asked_to(layout: str) -> None:
    assert ("collective-permute" in run("adamw", layout).hlo) == (layout in RINGS)


def test_a_fresh_state_is_the_same_on_every_mesh() -> None:
    mesh = on(replica=2, expert=2, model=2)
    wanted = dict(tree.named_leaves(start("adamw")))
    for name, leaf in tree.named_leaves(init_state(ADAMW, mesh)):
        np.testing.assert_allclose(np.asarray(leaf), wanted[name], rtol=1e-6, err_msg=name)


def test_targets_are_the_next_tokens() -> None:
    tokens = np.arange(15, dtype=np.int32).reshape(3, 5)
    batch = Batch(tokens_BL=tokens, weights_BL=np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(batch.inputs()[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(batch.targets(), np.asarray(batch.inputs()) + 1)
