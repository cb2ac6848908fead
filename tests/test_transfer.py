"""Rates and scales carried over: by hand, from Specs, and where the model is its own base."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from meshes import ROWS, on, put, put_params
from reference import assert_close

from jaxmoe import spec as spec_lib
from jaxmoe import transfer, tree
from jaxmoe.config import MlaConfig, ModelConfig, OptimConfig, RouterConfig, TransferConfig, replace
from jaxmoe.model.lm import lm_loss, lm_specs
from jaxmoe.optim import optimizer
from jaxmoe.spec import Spec, is_spec

SMALL = ModelConfig(
    vocab_size=42,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_head=8,
    d_ff=24,
    n_experts=6,
    n_shared_experts=1,
    first_dense=1,
    d_ff_dense=40,
    loss_chunk=8,
    router=RouterConfig(load_balance_coef=0.3, z_coef=0.6),  # heavy: it shows
)
BASE = transfer.tuned_at(SMALL)
# Each width by a factor of its own, so that no rule can take one for the other.
LARGE = replace(
    SMALL,
    d_model=64,
    n_layers=6,
    n_heads=6,
    n_kv_heads=6,
    d_head=16,
    d_ff=48,
    d_ff_dense=200,
    transfer=BASE,
)


def named(cfg: ModelConfig) -> dict[str, Spec]:
    return dict(tree.named_leaves(lm_specs(cfg), is_leaf=is_spec))


def of_layer(name: str, cfg: ModelConfig = LARGE) -> Spec:
    return next(spec for path, spec in named(cfg).items() if path.endswith(name))


# name: r_in, r_out; D x 4, N H x 6, F x 2, dense F x 5, vocabulary and experts x 1
RATIOS = {
    "embed_VD": (1, 4),
    "head_DV": (4, 1),
    "attention/wq_DNH": (4, 6),
    "attention/wo_NHD": (6, 4),
    "attention/q_norm": (1, 2),
    "attention_norm_D": (1, 4),
    "router/w_DE": (4, 1),
    "experts/wgate_EDF": (4, 2),
    "experts/wdown_EFD": (2, 4),
    "shared/wup_DF": (4, 2),
    "1/0/ffn/shared/wdown_FD": (2, 4),
    "0/0/ffn/wgate_DF": (4, 5),
    "0/0/ffn/wdown_FD": (5, 4),
}


@pytest.mark.parametrize("name", RATIOS)
def test_rules_of_each_parameter_by_hand(name: str) -> None:
    spec, plain = of_layer(name), of_layer(name, replace(LARGE, transfer=None))
    r_in, r_out = RATIOS[name]
    outside = name in ("embed_VD", "head_DV")
    assert transfer.adam_rate(spec) == pytest.approx(1 / r_in)
    assert transfer.epsilon(spec) == pytest.approx(1 / r_out / (1 if outside else 3))
    gain = plain.gain
    if spec.inputs:
        gain *= min(1, math.sqrt(r_out / r_in))
        gain *= transfer.OUT_GAIN if name in ("head_DV", "router/w_DE") else 1
    if "wo_" in name or "wdown" in name:
        gain *= math.sqrt(3)  # drawn as with two layers, not six
    assert spec.gain == pytest.approx(gain)
    assert (plain.base, plain.depth) == ((), 1.0)


def test_muon_keeps_the_norm_of_an_update_to_that_of_its_matrix() -> None:
    """What moves is as sqrt(fan_out / fan_in), whatever the shape."""
    for name in RATIOS:
        spec = of_layer(name)
        if not spec.is_matrix:
            continue

        def norm(s: Spec) -> float:
            return 0.2 * math.sqrt(max(s.fan_in, s.fan_out))  # optim.orthogonalize

        ratio = transfer.muon_rate(spec) * norm(spec) / norm(spec.tuned)
        r_in, r_out = RATIOS[name]
        assert ratio == pytest.approx(math.sqrt(r_out / r_in)), name


def test_latent_attention_and_further_tokens_have_their_own_ratios() -> None:
    mla = MlaConfig(q_rank=12, kv_rank=8, d_nope=8, d_rope=4, d_value=6)
    small = replace(SMALL, mla=mla, qk_norm="none", n_mtp=1)
    wide = MlaConfig(q_rank=36, kv_rank=16, d_nope=40, d_rope=8, d_value=30)
    large = replace(small, d_model=64, n_layers=6, mla=wide, transfer=transfer.tuned_at(small))
    rate = {
        n: transfer.adam_rate(of_layer(f"0/0/attention/{n}", large))
        for n in ("wqa_DQ", "wq_QNH", "wk_JNI", "wo_NUD")
    }
    assert rate == pytest.approx(
        {"wqa_DQ": 1 / 4, "wq_QNH": 1 / 3, "wk_JNI": 1 / 2, "wo_NUD": 1 / 5}
    )
    assert transfer.attention_scale(large) == pytest.approx(0.5)
    assert transfer.adam_rate(of_layer("mtp/0/wembed_DD", large)) == pytest.approx(1 / 4)
    assert of_layer("mtp/0/layer/attention/wo_NUD", large).depth == 3


def run(cfg: ModelConfig, params: Any = None) -> Any:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)
    specs = lm_specs(cfg)
    with jax.set_mesh(on()):
        if params is None:
            params = spec_lib.init(specs, jax.random.key(0))
        placed = put_params(on(), params, specs)
        inputs = (tokens[:, :-1], tokens[:, 1:], np.ones((2, 8), np.float32))
        sums, _ = jax.jit(lm_loss, static_argnums=4)(placed, *put(on(), inputs, (ROWS,) * 3), cfg)
    return float(sums.total), params


def test_at_the_base_only_what_is_drawn_for_head_and_router_differs() -> None:
    own = replace(SMALL, transfer=BASE)
    for (name, a), (_, b) in zip(named(SMALL).items(), named(own).items(), strict=True):
        factor = transfer.OUT_GAIN if name.endswith(("head_DV", "w_DE")) else 1
        assert b.gain == pytest.approx(a.gain * factor), name
        assert (transfer.adam_rate(b), transfer.muon_rate(b), transfer.epsilon(b)) == (1, 1, 1)
    loss, params = run(SMALL)
    assert run(own, params)[0] == loss


def test_scales_of_the_forward_pass() -> None:
    """A branch over 3 for three times the layers, scores over sqrt(2) for heads twice as wide, and
    a tied embedding over 4 where it is the head."""
    assert transfer.residual_scale(LARGE) == pytest.approx(1 / 3)
    assert transfer.attention_scale(LARGE) == pytest.approx(math.sqrt(0.5))
    tied = replace(LARGE, tie_embeddings=True)
    assert transfer.tied_scale(tied) == 0.25
    assert of_layer("embed_VD", tied).gain == pytest.approx(16**-0.5)  # as in the base
    assert (transfer.residual_scale(SMALL), transfer.attention_scale(SMALL)) == (1, 1)


def test_the_model_has_these_scales() -> None:
    """The same loss as without `transfer`, where they are in the parameters and coefficients."""
    loss, params = run(LARGE)

    def scaled(name: str, a: Any) -> Any:
        last = name.rsplit("/", 1)[1] if "/" in name else name
        factors = {"wo_NHD": 1 / 3, "wdown_FD": 1 / 3, "wdown_EFD": 1 / 3, "q_norm": 0.5**0.5}
        return a * factors.get(last, 1.0)

    third = RouterConfig(load_balance_coef=0.1, z_coef=0.2)
    plain, same = replace(LARGE, transfer=None, router=third), tree.map_named(scaled, params)
    assert run(plain, same)[0] == pytest.approx(loss, rel=1e-6)
    tied = replace(LARGE, tie_embeddings=True)
    loss, params = run(tied)
    untied = replace(params, head_DV=params.embed_VD.T / 4)
    assert run(LARGE, untied)[0] == pytest.approx(loss, rel=1e-6)


SPECS = {
    "hidden": Spec(
        shape=(2, 8, 6),
        axes=("layers", "embed", "ff"),
        inputs=("embed",),
        base=(2, 3),
        depth=5.0,
    ),
    "embed": Spec(shape=(7, 8), axes=("vocab", "embed"), base=(7, 2)),
    "norm": Spec(shape=(8,), axes=("norm",), init="ones", base=(2,)),
}
PLAIN = spec_lib.map_specs(lambda s: replace(s, base=(), depth=1.0), SPECS)
ADAMW = OptimConfig(
    lr=0.1, clip=1e9, weight_decay=0.3, warmup_steps=0, schedule="constant", eps=0.5
)


def draw(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return spec_lib.map_specs(lambda s: rng.normal(size=s.shape).astype(np.float32), SPECS)


def test_adamw_has_a_rate_and_an_epsilon_for_each_parameter() -> None:
    """Decay is times the plain rate: lr * decay, the timescale, is that of the base."""
    tx = optimizer(ADAMW, SPECS, 10)
    params = draw(0)
    state = tx.init(params)
    rate = {"hidden": 1 / 4, "embed": 1, "norm": 1}
    eps = {"hidden": 0.5 / 2 / 5, "embed": 0.5 / 4, "norm": 0.5 / 4}
    m, v = ({name: np.zeros(s.shape) for name, s in SPECS.items()} for _ in range(2))
    for t in range(1, 4):
        grads = draw(t)
        updates: Any
        updates, state = tx.update(grads, state, params)
        for name, g in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * np.float64(g) ** 2
            own = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + eps[name])
            decay = 0.3 * params[name] if name == "hidden" else 0
            assert_close(updates[name], -0.1 * (rate[name] * own + decay), name=name)


def test_muon_has_a_rate_for_each_matrix() -> None:
    cfg = replace(ADAMW, name="muon", weight_decay=0.0, eps=1e-12)
    with jax.set_mesh(on()):
        both: list[Any] = []
        for specs in (SPECS, PLAIN):
            tx = optimizer(cfg, specs, 10)
            params, grads = (jax.device_put(draw(i), jax.P()) for i in (0, 1))
            both.append(jax.jit(lambda p, g, tx=tx: tx.update(g, tx.init(p), p)[0])(params, grads))
    # Of [8, 6] from [2, 3]: sqrt(6 / 8) / sqrt(8) over sqrt(3 / 2) / sqrt(3).
    assert_close(both[0]["hidden"], both[1]["hidden"] * (math.sqrt(3 / 32) / math.sqrt(0.5)))
    assert_close(both[0]["embed"], both[1]["embed"])


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_state_is_that_of_the_optimiser_alone(name: Any) -> None:
    """A checkpoint's layout does not change, and without a base nor does the update."""
    cfg = replace(ADAMW, name=name)
    states = [
        jax.eval_shape(lambda p, s=s: optimizer(cfg, s, 10).init(p), draw(0))
        for s in (SPECS, PLAIN)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_decay_by_the_timescale() -> None:
    """Weights are a mean over the last fifth of 500 updates."""
    assert transfer.weight_decay(0.01, 500, 0.2) == pytest.approx(1.0)
    w, lr = 1.0, 0.01
    for _ in range(100):  # one timescale
        w -= lr * transfer.weight_decay(lr, 500, 0.2) * w
    assert w == pytest.approx(math.exp(-1), rel=0.01)


@pytest.mark.parametrize(("own", "base"), [(1, 4), (4, 1)])
def test_a_single_key_and_value_head_is_a_number_of_heads_like_others(own: int, base: int) -> None:
    few = replace(SMALL, n_heads=4, d_head=4, n_kv_heads=base)
    many = replace(few, n_kv_heads=own, transfer=transfer.tuned_at(few))
    spec = of_layer("attention/wk_DKH", many)
    assert transfer._ratios(spec) == (1.0, own / base)


def test_another_architecture_is_refused() -> None:
    """The base of a Spec is one of the same dims."""
    with pytest.raises(AssertionError):
        transfer.with_base(SPECS["hidden"], SPECS["norm"])
    fields = {f.name for f in dataclasses.fields(TransferConfig)}
    assert fields == set(transfer.FIELDS)
