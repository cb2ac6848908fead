"""Every member of the family is its plain model: loss, and the gradient of every parameter.

Each bundle of features is held on one device against the reference (full scores, every expert for
every token), and the two richest ones on eight devices against one.
"""

import functools
import itertools
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import reference
from meshes import on, put
from reference import assert_close

from jaxmoe import mesh as mesh_lib
from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import MlaConfig, ModelConfig, RopeConfig, RouterConfig, replace
from jaxmoe.kernels import exchange
from jaxmoe.model.lm import lm_logits, lm_loss, lm_specs
from jaxmoe.model.stack import segments

B, L = 4, 12

# Every dim has a size of its own where the mesh allows, and auxiliary losses are heavy, so that a
# wrong one shows.
BASE = ModelConfig(
    vocab_size=42,
    d_model=24,
    n_heads=10,
    d_head=6,
    d_ff=14,
    n_experts=8,
    top_k=3,
    z_loss_coef=0.01,
    loss_chunk=4,
    router=RouterConfig(load_balance_coef=0.3, z_coef=0.05),
)
YARN = RopeConfig(theta=50.0, scaling="yarn", factor=4.0, original_length=6, beta_fast=2.0)
CONFIGS = {
    "gpt_oss": replace(
        BASE,
        n_layers=2,  # a window, and all
        n_kv_heads=2,
        qk_norm="none",
        rope=replace(YARN, truncate=False),
        attention_bias=True,
        attention_sinks=True,
        sliding_window=4,
        global_every=2,
        activation="clamped_swiglu",
        swiglu_limit=0.8,
        expert_bias=True,
        router=replace(BASE.router, bias=True),
    ),
    "deepseek": replace(
        BASE,
        n_layers=3,
        n_kv_heads=10,
        mla=MlaConfig(q_rank=20, kv_rank=16, d_nope=7, d_rope=4, d_value=9),
        qk_norm="none",
        rope=replace(YARN, mscale=0.7, mscale_all_dim=1.4),
        n_experts=16,
        n_shared_experts=3,
        first_dense=1,
        d_ff_dense=26,
        router=RouterConfig(
            score="sigmoid",
            scale=1.7,
            n_groups=4,
            top_k_groups=2,
            balance_bias_rate=0.01,
            load_balance_coef=0.3,
            load_balance_scope="sequence",
            z_coef=0.05,
        ),
        n_mtp=2,
        mtp_coef=0.7,
    ),
    "mla_without_q_rank": replace(
        BASE,
        n_layers=1,
        n_kv_heads=10,
        mla=MlaConfig(kv_rank=16, d_nope=7, d_rope=6, d_value=9),
        qk_norm="none",
        rope=RopeConfig(theta=50.0, scaling="llama3", factor=4.0, original_length=40),
        attention_sinks=True,
        attention_soft_cap=1.5,
        sliding_window=5,
        n_mtp=1,
        router=replace(BASE.router, score="sigmoid", norm_top_k=False),
    ),
    "olmoe": replace(
        BASE,
        n_layers=5,  # two periods of a dense layer and one with experts, and a dense remainder
        n_kv_heads=5,
        qk_norm="full",
        tie_embeddings=True,
        attention_soft_cap=1.5,
        logit_soft_cap=2.0,
        moe_every=2,
        router=replace(BASE.router, norm_top_k=False),
    ),
    "dense": replace(
        BASE,
        n_layers=3,
        n_kv_heads=1,
        qk_norm="per_head",
        rope=RopeConfig(theta=50.0, scaling="ntk", factor=3.0),
        n_experts=1,
        top_k=1,
        n_mtp=1,
    ),
}
PACKED = ("gpt_oss", "deepseek", "dense")
# Attention of one key/value head on two `model` shards, and noise on the router's input.
MQA = replace(
    CONFIGS["gpt_oss"],
    n_layers=1,
    n_kv_heads=1,
    qk_norm="full",
    router=replace(CONFIGS["gpt_oss"].router, jitter=0.3),
)


@functools.cache
def batch(packed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens, weights uneven over rows, and documents of uneven lengths with padding (0)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, BASE.vocab_size, (B, L + 1)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, L), p=[0.2, 0.3, 0.5]).astype(np.float32)
    if not packed:
        return tokens, weights, None
    lengths = ((12,), (5, 7), (1, 6, 3), (8, 4))
    documents = np.zeros((B, L), np.int32)
    for row, of_row in enumerate(lengths):
        numbers = np.repeat(np.arange(len(of_row)) + 1, of_row)
        documents[row, : len(numbers)] = numbers
    return tokens, weights * (documents > 0), documents


@functools.cache
def start(name: str) -> Any:
    """Parameters; what is drawn as zeros or ones would hide a bias or a scale that is left out."""
    cfg = MQA if name == "mqa" else CONFIGS[name]
    rng = np.random.default_rng(1)

    def draw(spec: spec_lib.Spec) -> np.ndarray:
        noise = rng.normal(size=spec.shape)
        if spec.init == "ones":
            return (1 + 0.3 * noise).astype(np.float32)
        std = 0.5 if spec.init == "zeros" else spec.gain / np.sqrt(spec.fan_in)
        return (std * noise).astype(np.float32)

    return spec_lib.map_specs(draw, lm_specs(cfg))


@partial(jax.jit, static_argnums=5)
def ours(p: Any, tokens: Any, weights: Any, documents: Any, key: Any, cfg: ModelConfig) -> Any:
    def f(params: Any) -> Any:
        args = (tokens[:, :-1], tokens[:, 1:], weights, cfg, documents, key)
        sums, stats = lm_loss(params, *args)
        return sums.total / sums.weight, (sums, stats)

    return jax.value_and_grad(f, has_aux=True)(p)


def run(name: str, cfg: ModelConfig, seed: int = 5, **axes: int) -> Any:
    mesh = on(**axes)
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        # Each capacity costs compile time; test_moe.py and test_layouts.py go through them.
        patch.setattr(exchange, "CAPACITY_FACTORS", (1.25,))
        params = jax.device_put(start(name), mesh_lib.shardings(lm_specs(cfg), mesh))
        args = [None if a is None else put(mesh, a) for a in batch(name in PACKED)]
        key = jax.random.key(seed) if cfg.router.jitter else None
        return jax.tree.map(np.asarray, ours(params, *args, key, cfg))


@functools.cache
def on_one(name: str) -> Any:
    return run(name, CONFIGS[name])


def assert_same_gradients(got: Any, wanted: Any) -> None:
    """Of every parameter; that of the balance bias is exactly zero."""
    for (path, g), w in zip(tree.named_leaves(got), jax.tree.leaves(wanted), strict=True):
        if path.endswith("balance_bias_E"):
            assert not g.any() and not np.asarray(w).any(), path
        else:
            assert_close(g, w, name=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_are_the_plain_models(name: str) -> None:
    """A step's gradient for each router kind is that of computing all experts densely."""
    (value, (sums, stats)), grads = on_one(name)
    cfg = CONFIGS[name]
    tokens, weights, documents = batch(name in PACKED)
    plain = jax.value_and_grad(
        lambda p: reference.objective(p, tokens, weights, cfg, documents), has_aux=True
    )
    (wanted, parts), wanted_grads = jax.jit(plain)(start(name))
    assert_close(value, wanted, name="loss")
    assert_close(sums.nll, parts["nll"], name="nll")
    if cfg.n_mtp:
        assert_close(stats.mtp_nll, np.array(parts["mtp_nll"]), name="mtp_nll")
    assert (stats.router is None) == (not parts["routers"])
    for i, of_layer in enumerate(parts["routers"]):  # in the order of the layers, MTP last
        for part, want in of_layer.items():
            assert_close(getattr(stats.router, part)[i], want, name=f"layer {i}: {part}")
    assert_same_gradients(grads, wanted_grads)


def assert_same_run(got: Any, wanted: Any) -> None:
    (value, (_, stats)), grads = got
    (wanted_value, (_, wanted_stats)), wanted_grads = wanted
    assert_close(value, wanted_value, name="loss")
    # Whether a buffer overflows is a matter of the layout.
    ours, theirs = (replace(s.router, overflow=None) for s in (stats, wanted_stats))
    for (path, g), w in zip(tree.named_leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6, err_msg=path)
    assert_same_gradients(grads, wanted_grads)


def test_deepseek_is_the_same_on_eight_devices() -> None:
    wanted = on_one("deepseek")
    assert_same_run(run("deepseek", CONFIGS["deepseek"], data=2, expert=2, model=2), wanted)


def test_gpt_oss_is_the_same_on_eight_devices() -> None:
    """With one key/value head for all `model` shards, and the same jitter on every layout."""
    one = run("mqa", MQA)
    assert_same_run(run("mqa", MQA, data=2, expert=2, model=2), one)
    (other, _), _ = run("mqa", MQA, seed=6)
    assert abs(one[0][0] - other) > 1e-3  # there was noise


def test_a_packed_row_gives_the_logits_of_its_documents_alone() -> None:
    """A document is the same wherever in a row it stands."""
    cfg = CONFIGS["dense"]
    tokens, _, documents = batch(True)
    assert documents is not None
    rows = [(row, n) for row in range(B) for n in range(1, 1 + documents[row].max())]
    both = np.zeros((2, B + len(rows), L), np.int32)  # tokens and documents, packed then alone
    both[:, :B] = tokens[:, :L], documents
    for i, (row, n) in enumerate(rows, start=B):
        mine = documents[row] == n
        both[:, i, : mine.sum()] = np.stack([tokens[row, :L][mine], np.ones(mine.sum())])
    mesh = on()
    with jax.set_mesh(mesh):
        params = jax.device_put(start("dense"), mesh_lib.shardings(lm_specs(cfg), mesh))
        args = put(mesh, both[0]), put(mesh, both[1])
        got = np.asarray(jax.jit(lm_logits, static_argnums=2)(params, args[0], cfg, args[1]))
    for i, (row, n) in enumerate(rows, start=B):
        mine = documents[row] == n
        assert_close(got[row, mine], got[i, : mine.sum()], name=f"{row}, {n}")
    assert len(rows) == 8


def test_every_layer_is_of_its_kind() -> None:
    """Periods of experts and of windows, after the leading dense layers, for any depth."""
    for depth, first, every, all_seen in itertools.product((1, 5, 7), (0, 1, 3), (1, 2), (0, 2, 3)):
        if first >= depth:
            continue
        fields = {"n_layers": depth, "first_dense": first, "moe_every": every}
        cfg = replace(BASE, **fields, sliding_window=4, global_every=all_seen)
        found = [k for s in segments(cfg) for _ in range(s.repeats) for k in s.period]
        assert [k.moe for k in found] == [reference.has_experts(i, cfg) for i in range(depth)]
        assert [k.window for k in found] == [reference.window_of(i, cfg) for i in range(depth)]
        assert len(segments(cfg)) <= 4
    dense = replace(CONFIGS["dense"], n_layers=48)
    assert [(len(s.period), s.repeats) for s in segments(dense)] == [(1, 48)]
