"""The router's statistics, jitter, and the bias that evens out loads: what each one promises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import TOKENS, on, put
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import Config, ModelConfig, OptimConfig, RouterConfig, TrainConfig, replace
from jaxmoe.context import straight
from jaxmoe.kernels import exchange
from jaxmoe.model import stack
from jaxmoe.model.lm import make_places
from jaxmoe.model.router import Router, RouterSums, route
from jaxmoe.run.state import abstract_state, init_state
from jaxmoe.run.step import Batch, abstract_batch, train_step

B, L, D, E, A = 8, 20, 10, 8, 3


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cfg_of(**router: Any) -> ModelConfig:
    return ModelConfig(d_model=D, n_experts=E, top_k=A, router=RouterConfig(**router))


def router_of(w: Any) -> Router:
    return Router(w_DE=w, bias_E=None, balance_bias_E=None)


# Statistics

# Uneven padding: a row without any, one of nothing else.
VALID = np.arange(L)[None] < np.array([20, 3, 11, 0, 20, 7, 1, 15])[:, None]
GROUPS = {  # rows whose loads are averaged, on four devices
    "sequence": [[row] for row in range(B)],
    "microbatch": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "global": [list(range(B))],
}


def by_hand(probs: np.ndarray, valid: np.ndarray, groups: list[list[int]]) -> tuple[Any, Any]:
    """Load-balance loss, weighted by the tokens of each group, and the whole batch's loads."""
    top = np.argsort(-probs, axis=-1)[..., :A]

    def shares(where: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
        kept = valid[where]
        chosen = np.bincount(top[where][kept].ravel(), minlength=E)
        return chosen / (A * kept.sum()), probs[where][kept].mean(0), kept.sum()

    total = 0.0
    for group in groups:
        if valid[group].any():
            share, mean, n = shares(group)
            total += n * E * (share * mean).sum()
    return total / valid.sum(), E * shares(list(range(B)))[0]


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", GROUPS)
def test_statistics_are_over_their_scope(scope: Any, padded: bool, c: int) -> None:
    """On four devices, or twice as many where two share each sequence, against numpy; padding
    counts nowhere, nor does it get a gradient."""
    x = rows(1, B, L, D) + 2 * rows(3, B, 1, D)  # rows differ, so that shards do
    w = rows(2, D, E) / np.float32(2)
    valid = VALID if padded else np.ones((B, L), bool)
    cfg = cfg_of(load_balance_scope=scope)

    @jax.jit
    def run(x: Any, w: Any, valid: Any) -> Any:
        def f(x: Any) -> Any:
            weights, ids, sums = route(router_of(w), x, cfg, valid)
            stats = sums.means(cfg)
            return stats.load_balance + stats.router_z, (weights, ids, stats)

        return jax.grad(f, has_aux=True)(x)

    mesh = on(data=2, expert=2, context=c)
    with jax.set_mesh(mesh):
        args = put(mesh, (x, w, valid), (TOKENS, P(), TOKENS))
        dx, (weights, ids, stats) = run(*args)
    logits = x.astype(np.float64) @ w
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    balance, load = by_hand(probs, valid, GROUPS[scope])
    others = [by_hand(probs, valid, groups)[0] for name, groups in GROUPS.items() if name != scope]
    others.append(by_hand(probs, ~valid if padded else VALID, GROUPS[scope])[0])
    assert all(abs(other - balance) > 0.01 * balance for other in others)  # or it could not tell
    assert_close(stats.load_balance, balance)
    assert_close(stats.load_E, load)
    assert_close(stats.router_z, (np.log(np.exp(logits).sum(-1)) ** 2)[valid].mean())
    assert_close(np.asarray(weights).sum(-1), np.ones((B, L)))
    np.testing.assert_array_equal(np.sort(ids), np.sort(np.argsort(-probs)[..., :A]))
    assert (np.abs(dx).max(-1) > 0).tolist() == valid.tolist()


def test_a_batch_of_nothing_but_padding_has_finite_statistics() -> None:
    for scope in GROUPS:
        with jax.set_mesh(on()):
            x, valid = put(on(), (rows(1, 2, 4, D), np.zeros((2, 4), bool)), TOKENS)
            cfg = cfg_of(load_balance_scope=scope)
            _, _, sums = jax.jit(route, static_argnums=2)(
                router_of(put(on(), rows(2, D, E), P())), x, cfg, valid
            )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums.means(cfg)))


# Jitter


def test_jitter_is_uniform_noise_on_the_routers_input() -> None:
    """Scores of an identity router give the noise back; without a key there is none."""
    cfg = replace(
        cfg_of(score="sigmoid", norm_top_k=False, jitter=0.25), d_model=E, n_experts=E, top_k=E
    )
    x = 1 + np.abs(rows(1, B, L, E)) / 4

    def noise(key: Any, **axes: int) -> np.ndarray:
        mesh = on(**axes)
        with jax.set_mesh(mesh):
            w, placed = put(mesh, np.eye(E, dtype=np.float32), P()), put(mesh, x, TOKENS)
            weights, ids, _ = jax.jit(route, static_argnums=2)(router_of(w), placed, cfg, None, key)
        scores = np.zeros(x.shape)
        np.put_along_axis(scores, np.asarray(ids), np.asarray(weights), axis=-1)
        return np.log(scores / (1 - scores)) / x

    np.testing.assert_allclose(noise(None), 1, rtol=1e-5)
    drawn = noise(jax.random.key(3))
    assert drawn.min() < 0.76 and drawn.max() > 1.24 and abs(drawn.mean() - 1) < 0.02
    assert 0.75 - 1e-5 < drawn.min() and drawn.max() < 1.25 + 1e-5
    assert abs(drawn.std() - 0.5 / np.sqrt(12)) < 0.01
    np.testing.assert_allclose(noise(jax.random.key(3), data=2, expert=4), drawn, rtol=1e-5)
    spread = noise(jax.random.key(3), data=2, context=2)
    np.testing.assert_allclose(straight(jnp.asarray(spread), 1, 2), drawn, rtol=1e-5)
    assert np.abs(noise(jax.random.key(4)) - drawn).max() > 0.2


def test_every_layer_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over segments, repeats and the layers of a period no key is used twice."""

    def spy(_: Any, x_BLD: Any, __: Any, ___: Any, key: Any) -> Any:
        bits = jax.random.bits(key, (2,), jnp.uint16).astype(jnp.float32)
        zero = jnp.float32(0)
        return jnp.zeros_like(x_BLD), RouterSums(bits, *[zero] * 8)

    monkeypatch.setattr(stack, "moe", spy)
    cfg = ModelConfig(
        d_model=8, n_layers=8, n_heads=2, d_head=2, first_dense=1, sliding_window=3, global_every=3
    )
    assert [s.repeats for s in stack.segments(cfg)] == [1, 2, 1]
    with jax.set_mesh(on()):
        params = put(on(), spec_lib.init(stack.layers_specs(cfg), jax.random.key(0)), P())
        x = put(on(), rows(0, 1, 4, 8), TOKENS)
        places = make_places(put(on(), np.zeros((1, 4), np.int32)), None, cfg)
        run = jax.jit(lambda key: stack.run_layers(params, x, places, cfg, key)[1])
        found: Any = stack.in_order(run(jax.random.key(1)))
    assert len(np.unique(found.load_E, axis=0)) == 7


# The balance bias

SKEWED = Config(
    model=ModelConfig(
        vocab_size=64,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_head=8,
        d_ff=8,
        n_experts=8,
        top_k=2,
        n_mtp=1,
        loss_chunk=32,
        router=RouterConfig(score="sigmoid", load_balance_coef=0, balance_bias_rate=0.003),
    ),
    optim=OptimConfig(lr=1e-3, warmup_steps=10, schedule="constant", weight_decay=0.3),
    train=TrainConfig(steps=200, batch_size=16, seq_len=64),
)
RATE = np.float32(0.003)


def skewed(steps: int) -> np.ndarray:
    """Tokens [steps, B, L + 1]: half are drawn, the n-th 1 / n as often as the first; half follow
    from the token before, so that there is something to learn from it."""
    rng, p = np.random.default_rng(0), 1 / np.arange(1, 65)
    shape = (steps, SKEWED.train.batch_size, SKEWED.train.seq_len + 1)
    tokens, follows = rng.choice(64, shape, p=p / p.sum()), rng.random(shape) < 0.5
    for i in range(1, shape[2]):
        after = (7 * tokens[..., i - 1] + 3) % 64
        tokens[..., i] = np.where(follows[..., i], after, tokens[..., i])
    return tokens.astype(np.int32)


@functools.cache
def compiled() -> Any:
    state, batch = abstract_state(SKEWED, on()), abstract_batch(SKEWED, on())
    with jax.set_mesh(on()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CAPACITY_FACTORS", (1.25,))
        return train_step.lower(state, batch, SKEWED).compile()


def step(state: Any, tokens: np.ndarray) -> tuple[Any, Any]:
    weights = np.ones((len(tokens), SKEWED.train.seq_len), np.float32)
    return compiled()(state, Batch(*put(on(), (tokens, weights))))


def biases(state: Any) -> np.ndarray:
    """[X, E], in the order of the statistics: the layers, then the MTP module."""
    modules = [module.layer.ffn.router.balance_bias_E[None] for module in state.params.mtp]
    return np.concatenate([state.params.layers[0][0].ffn.router.balance_bias_E, *modules])


def with_biases(state: Any, value: float) -> Any:
    def one(name: str, leaf: Any) -> Any:
        is_bias = name.endswith("balance_bias_E")
        return jax.device_put(np.full(leaf.shape, value, "f4"), leaf.sharding) if is_bias else leaf

    return state.replace(params=tree.map_named(one, state.params))


def test_the_bias_is_moved_by_its_rule_alone() -> None:
    """One rate up or down, by the loads: no gradient, no decay (it would shrink), no moment."""
    with jax.set_mesh(on()):
        state = with_biases(init_state(SKEWED, on()), 0.5)
        for tokens in skewed(2):
            before = biases(state)
            state, metrics = step(state, tokens)
            load = np.asarray(metrics.router.load_E)
            assert load.shape == (3, 8) and load.max() > 1.2 > 0.8 > load.min()
            np.testing.assert_array_equal(biases(state), before + RATE * np.sign(1 - load))
    named = [pair for pair in tree.named_leaves(state.opt_state) if "balance_bias_E" in pair[0]]
    assert len(named) == 4 and not any(np.asarray(leaf).any() for _, leaf in named)


def test_the_bias_balances_a_skewed_stream_without_a_loss() -> None:
    """Most over mean load, in every layer and the MTP module; the same run without it stays high
    (the bias is put back after each step). Half of the stream can be learnt: on tokens drawn alone,
    hidden states grow alike, and no bias can tell them apart (tried: 1.4 to 2.5)."""
    found = {}
    for balanced in (True, False):
        history, losses = [], []
        with jax.set_mesh(on()):
            state = init_state(SKEWED, on())
            for tokens in skewed(SKEWED.train.steps if balanced else 120):
                state, metrics = step(state, tokens)
                history.append(np.asarray(metrics.router.load_E).max(-1))
                losses.append(float(metrics.sums.nll / metrics.sums.weight))
                if not balanced:
                    state = with_biases(state, 0.0)
        found[balanced] = np.mean(history[-50:], axis=0)
        assert losses[-1] < losses[0] - 0.5  # it trains
    assert (found[True] < 1.2).all(), found
    assert (found[False] > 1.4).all(), found
    assert len(found[True]) == 3
