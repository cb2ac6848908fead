"""Norm, RoPE, the attention block, the embedding and bfloat16: what each one promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.sharding import PartitionSpec as P
from meshes import TOKENS, hlo, on, put, put_params
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe.config import ModelConfig, RopeConfig, replace
from jaxmoe.model.attention import Places, attention, attention_specs
from jaxmoe.model.lm import lm_loss, lm_specs, look_up
from jaxmoe.model.norm import rms_norm
from jaxmoe.model.rope import make_turns, rope

CFG = ModelConfig(
    vocab_size=50,
    d_model=20,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    d_ff=14,
    n_experts=5,
    top_k=4,
    loss_chunk=4,
)
B, L = 2, 12
ROPE = RopeConfig(theta=100.0)
ROWS_1L: Any = np.arange(L, dtype=np.int32)[None]  # positions


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def draw(specs: Any) -> Any:
    return jax.jit(lambda key: spec_lib.init(specs, key))(jax.random.key(0))


def test_rms_norm() -> None:
    x, scale = 5 * normal(0, 3, 4, 10), normal(1, 10)
    assert_close(rms_norm(scale, x, 1e-6), reference.rms_norm(scale, x, 1e-6))
    unit = rms_norm(jnp.ones(10), x, 1e-6)
    assert_close((unit**2).mean(-1), np.ones((3, 4)))
    assert_close(rms_norm(scale, 100 * x, 1e-6), rms_norm(scale, x, 1e-6))  # scale is divided out
    assert_close(rms_norm(jnp.ones(10), 1e-3 * x, 0.5), 1e-3 * x / np.sqrt(0.5), tolerance=1e-4)
    assert rms_norm(scale, x.astype(jnp.bfloat16), 1e-6).dtype == jnp.bfloat16
    over_two = normal(2, 4, 10)  # a scale of two dims is one norm over both
    assert_close(rms_norm(over_two, x, 1e-6), reference.rms_norm(over_two, x, 1e-6))


def test_rope_scores_depend_on_the_distance_only() -> None:
    h = 8
    q, k = normal(0, 1, 1, 1, h), normal(1, 1, 1, 1, h)
    turned_q, turned_k = (
        rope(jnp.broadcast_to(a, (1, L, 1, h)), make_turns(ROWS_1L, ROPE, h))[0, :, 0]
        for a in (q, k)
    )
    scores = np.asarray(turned_q @ turned_k.T)
    for distance in range(-L + 1, L):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
    assert np.ptp(scores[0]) > 0.5  # and they do depend on it


def test_rope_turns_the_right_way() -> None:
    """A score is Re sum q conj(k) exp(i (m - n) f): a turn one way for q and the other for k would
    still be relative, so the angle itself is compared."""
    x = normal(0, B, L, 3, 8)
    turned = rope(x, make_turns(ROWS_1L, ROPE, 8))
    assert_close(turned, reference.rope(x, np.tile(ROWS_1L, (B, 1)), ROPE))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])  # position 0 stays
    assert_close((turned**2).sum(-1), (x**2).sum(-1))
    # The first pair turns by one radian a position: (1, 0) goes to (cos 1, sin 1).
    turns = make_turns(ROWS_1L[:, :2], ROPE, 8)
    one = rope(jnp.zeros((1, 2, 1, 8)).at[..., 0].set(1), turns)[0, 1, 0]
    np.testing.assert_allclose([one[0], one[4]], [np.cos(1), np.sin(1)], rtol=1e-6)


def test_attention_block_equals_the_plain_one() -> None:
    shapes: dict[str, Any] = {"none": (), "per_head": ((8,), (8,)), "full": ((6, 8), (2, 8))}
    for qk_norm, shape in shapes.items():
        cfg = replace(CFG, qk_norm=qk_norm)
        params = draw(attention_specs(cfg))
        if shape:
            params = params.replace(q_norm=normal(5, *shape[0]), k_norm=normal(6, *shape[1]))
        placed = put_params(on(), params, attention_specs(cfg))
        x = normal(1, B, L, cfg.d_model)
        with jax.set_mesh(on()):
            run = jax.jit(attention, static_argnums=(3, 4))
            got = run(
                placed,
                put(on(), x, TOKENS),
                Places(turns=make_turns(ROWS_1L, cfg.rope, cfg.d_head)),
                cfg,
                None,
            )
        plain = jax.jit(reference.attention, static_argnums=2)
        assert_close(got, plain(params, x, cfg))


def test_embedding_is_looked_up_without_gathering_anything() -> None:
    """Rows of a table that is sharded over `model`: right, and no collective but their sum."""
    mesh = on(data=2, expert=2, model=2)
    table = np.random.default_rng(0).normal(size=(CFG.vocab_size, CFG.d_model)).astype(np.float32)
    tokens = np.random.default_rng(1).permutation(CFG.vocab_size)[:48].reshape(4, 12)
    with jax.set_mesh(mesh):
        args = put(mesh, (table, tokens.astype(np.int32)), (P("model"), TOKENS))
        compiled = jax.jit(look_up).lower(*args).compile()
        np.testing.assert_array_equal(compiled(*args), table[tokens])
    text = hlo(compiled)
    assert " all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


def test_bfloat16_computes_the_same_loss_roughly() -> None:
    """Parameters, loss sums and router stay float32, and their gradients too."""
    params = draw(lm_specs(CFG))
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, L + 1)).astype(np.int32)
    weights = np.ones((B, L), np.float32)

    def loss(params: Any, cfg: ModelConfig) -> Any:
        inputs, targets = (put(on(), a) for a in (tokens[:, :-1], tokens[:, 1:]))
        sums, _ = lm_loss(params, inputs, targets, put(on(), weights), cfg)
        return sums.total / sums.weight

    with jax.set_mesh(on()):
        half = replace(CFG, dtype="bfloat16")
        got = jax.jit(loss, static_argnums=1)(params, half)
        abstract = jax.eval_shape(lambda p: jax.value_and_grad(loss)(p, half), params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract)} == {"float32"}
    want = jax.jit(reference.loss, static_argnums=3)(params, tokens, weights, CFG)
    assert got != want
    np.testing.assert_allclose(got, want, rtol=1e-2)
