"""Position i depends on positions 0 .. i of its own document that its window lets it see, and on
nothing else: gradients elsewhere are exactly zero, and nowhere zero where they should not be."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import reference
from jax.sharding import Mesh
from meshes import on, put, put_params

from jaxmoe import spec as spec_lib
from jaxmoe.config import MlaConfig, ModelConfig, RouterConfig, replace
from jaxmoe.context import spread
from jaxmoe.kernels import exchange
from jaxmoe.model.attention import attention, attention_specs
from jaxmoe.model.lm import hidden, lm_loss, lm_specs, make_places, positions

B, L = 2, 12
CFG = ModelConfig(
    vocab_size=30,
    d_model=24,  # experts gather it over `context`, of three
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    d_ff=14,
    n_experts=5,
    top_k=4,
    loss_chunk=4,
)
# Row 0 ends with padding (0).
DOCUMENTS = np.array([[1] * 4 + [2] * 6 + [0] * 2, [1] * 12], np.int32)
MLA = MlaConfig(q_rank=6, kv_rank=10, d_nope=4, d_rope=4, d_value=7)
LATENT = replace(CFG, n_layers=2, n_kv_heads=6, mla=MLA, qk_norm="none", n_mtp=2)


@pytest.fixture(autouse=True)
def _one_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CAPACITY_FACTORS", (1.25,))  # each costs compile time


def draw(specs: Any) -> Any:
    return jax.jit(lambda key: spec_lib.init(specs, key))(jax.random.key(0))


def seen(window: int | None = None, documents: np.ndarray | None = None) -> np.ndarray:
    """[row, i, j]: whether position i may see j, written out."""
    found = np.zeros((B, L, L), bool)
    for row in range(B):
        for i in range(L):
            for j in range(i + 1):
                same = documents is None or documents[row, i] == documents[row, j]
                found[row, i, j] = same and (window is None or i - j < window)
    return found


def gradient_of_attention(
    cfg: ModelConfig, window: int | None, documents: np.ndarray | None, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    specs = attention_specs(cfg)
    params = put_params(mesh, draw(specs), specs)
    x = put(mesh, jax.random.normal(jax.random.key(1), (B, L, cfg.d_model)))
    tokens = put(mesh, np.zeros((B, L), np.int32))
    places = make_places(tokens, None if documents is None else put(mesh, documents), cfg)

    def f(x: Any, ct: Any) -> Any:
        return (attention(params, spread(x), places, cfg, window) * spread(ct)).sum()

    pull = jax.jit(jax.grad(f))
    return lambda ct: np.asarray(pull(x, ct))


def gradient_of_model(
    cfg: ModelConfig, _: None, documents: np.ndarray | None, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    """By rows of the embedding table: every position's token is a different one."""
    params = draw(lm_specs(cfg))
    tokens = np.random.default_rng(0).permutation(cfg.vocab_size)[: B * L].reshape(B, L)
    placed = put(mesh, tokens.astype(np.int32))
    places = make_places(placed, None if documents is None else put(mesh, documents), cfg)

    def f(embed: Any, ct: Any) -> Any:
        x_BLD, _ = hidden(params.replace(embed_VD=embed), placed, places, cfg)
        return (x_BLD * spread(ct)).sum()

    pull = jax.jit(jax.grad(f))
    return lambda ct: np.asarray(pull(params.embed_VD, ct))[tokens]


CASES: dict[str, tuple[Any, ModelConfig, int | None, np.ndarray | None]] = {
    "attention": (gradient_of_attention, CFG, None, None),
    "attention, window": (gradient_of_attention, CFG, 4, None),
    "attention, window and documents": (gradient_of_attention, CFG, 3, DOCUMENTS),
    "latent attention, window and documents": (gradient_of_attention, LATENT, 3, DOCUMENTS),
    "model": (gradient_of_model, CFG, None, None),
    "model, documents": (gradient_of_model, CFG, None, DOCUMENTS),
}


# Of two positions a block: three devices hold 0 1 and 10 11, 2 3 and 8 9, 4 to 7.
CONTEXT = {"context": 3}
ON_SHARDS = ("attention", "latent attention, window and documents", "model, documents")


@pytest.mark.parametrize(
    ("name", "axes"), [*((n, {}) for n in CASES), *((n, CONTEXT) for n in ON_SHARDS)]
)
def test_no_gradient_from_what_is_not_seen(name: str, axes: dict[str, int]) -> None:
    """d(output at i) / d(input at j) is exactly zero for j that i does not see, and for no other:
    the future, what lies outside the window (whose edge is exact), and other documents."""
    gradient, cfg, window, documents = CASES[name]
    wanted = seen(window, documents)
    mesh = on(**axes)
    with jax.set_mesh(mesh):
        pull = gradient(replace(cfg, context_attention="ring"), window, documents, mesh)
        for i in range(L):
            ct = np.zeros((B, L, cfg.d_model), np.float32)
            ct[0, i] = np.random.default_rng(i).normal(size=cfg.d_model)
            grad = pull(put(mesh, ct))
            assert not grad[1].any(), "another sequence is seen"
            size = np.abs(grad[0]).max(-1)
            assert not size[~wanted[0, i]].any(), (i, size)
            assert (size[wanted[0, i]] > 1e-7).all(), (i, size)


def test_windows_add_up_over_layers_and_end_exactly() -> None:
    """Three layers of a window of 3 reach 6 positions back, and no further."""
    mesh = on()
    with jax.set_mesh(mesh):
        pull = gradient_of_model(replace(CFG, sliding_window=3), None, None, mesh)
        ct = np.zeros((B, L, CFG.d_model), np.float32)
        ct[0, 10] = np.random.default_rng(0).normal(size=CFG.d_model)
        size = np.abs(pull(put(mesh, ct))[0]).max(-1)
    assert (size > 1e-7).tolist() == [4 <= j <= 10 for j in range(L)]
    assert not size[:4].any() and not size[11:].any()


def test_positions_restart_in_each_document() -> None:
    """Rotary scores are relative, so nothing downstream of attention could tell."""
    with jax.set_mesh(on()):
        tokens, documents = put(on(), (np.zeros((B, L), np.int32), DOCUMENTS))
        got = positions(tokens, documents)
        np.testing.assert_array_equal(got, reference.positions(DOCUMENTS, B, L))
        kept = make_places(tokens, documents, CFG).documents_BL
        np.testing.assert_array_equal(kept, DOCUMENTS)
        np.testing.assert_array_equal(positions(tokens, None), np.arange(L)[None])


@pytest.mark.parametrize(("packed", "axes"), [(False, {}), (True, {}), (True, CONTEXT)])
def test_the_loss_at_a_position_is_of_what_comes_before_its_target(
    packed: bool, axes: dict[str, int]
) -> None:
    """Through the MTP modules too, which see tokens ahead of their position but not of their
    target: with weight on target j alone, only tokens 0 .. j of its document have a gradient.
    Without auxiliary losses, which are over all tokens."""
    cfg = replace(LATENT, router=RouterConfig(load_balance_coef=0, z_coef=0))
    params = draw(lm_specs(cfg))
    tokens = np.random.default_rng(0).permutation(29)[: B * (L + 1)].reshape(B, L + 1) + 1
    documents = DOCUMENTS if packed else None
    wanted = seen(None, documents)[0]
    mesh = on(**axes)
    with jax.set_mesh(mesh):
        inputs, targets = put(
            mesh, (tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32))
        )
        placed = None if documents is None else put(mesh, documents)

        def f(embed: Any, weights: Any) -> Any:
            p = params.replace(embed_VD=embed)
            sums, stats = lm_loss(p, inputs, targets, weights, cfg, placed)
            return sums.total, stats.mtp_nll

        pull = jax.jit(jax.grad(f, has_aux=True))
        for j in range(10 if packed else L):
            weights = np.zeros((B, L), np.float32)
            weights[0, j] = 1
            grad, mtp = pull(params.embed_VD, put(mesh, weights))
            size = np.abs(np.asarray(grad))[tokens].max(-1)
            assert not size[1].any() and not size[0, L], "not an input, or another sequence"
            assert not size[0, :L][~wanted[j]].any(), (j, size)
            assert (size[0, :L][wanted[j]] > 1e-7).all(), (j, size)
            # A module is asked where token i, k before the target, is of the same document.
            asked = [j >= k and bool(wanted[j, j - k]) for k in (1, 2)]
            assert (np.asarray(mtp) > 0).tolist() == asked, (j, mtp)
