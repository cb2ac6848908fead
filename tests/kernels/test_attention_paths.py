"""Every path of attention is the same softmax attention; which is taken, and what it costs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import SCALE, draw, features_equal_the_plain_einsum, packed
from meshes import TOKENS, on, put, put_params
from reference import assert_close

from jaxmoe import attention_paths
from jaxmoe import spec as spec_lib
from jaxmoe.attention_paths import Call, obstacle
from jaxmoe.config import ModelConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.kernels import attention as kernel
from jaxmoe.kernels import fused, online
from jaxmoe.kernels.attention import LONG, causal_attention
from jaxmoe.model import attention as model
from jaxmoe.model.rope import make_turns

BLOCK = 16  # of the online softmax here, so that short sequences have several


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "BLOCK", BLOCK)
    monkeypatch.setattr(kernel, "LONG", 0)


# Lengths of whole blocks and not; windows of one position, within a block, of a block and around,
# over blocks; features alone and together; multi-head, grouped, multi-query; U != H.
ONLINE = {
    "one block, not full": (5, {}, {}),
    "window 1": (2 * BLOCK + 3, {"window": 1}, {}),
    "window of a block": (4 * BLOCK, {"window": BLOCK}, {"n": 4, "k": 4}),
    "window of a block and one": (4 * BLOCK + 3, {"window": BLOCK + 1}, {"n": 2, "k": 1}),
    "window of a block and two": (4 * BLOCK, {"window": BLOCK + 2}, {"n": 2, "k": 1}),
    "documents": (5 * BLOCK + 3, {"documents": True}, {}),
    "sinks": (2 * BLOCK + 3, {"sinks": True}, {"n": 4, "k": 4, "u": 6}),
    "everything": (
        5 * BLOCK + 7,
        {"window": BLOCK + 9, "soft_cap": 2.0, "documents": True, "sinks": True},
        {"u": 14},
    ),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ONLINE)
def test_online_equals_the_plain_einsum(name: str) -> None:
    features_equal_the_plain_einsum(partial(causal_attention, path="chunked"), *ONLINE[name])


@pytest.mark.usefixtures("small_blocks")
def test_online_survives_scores_that_no_exponential_could_hold() -> None:
    """Scores of +-1e4, and sinks far above and below them."""
    q, k, v, ct = draw(3 * BLOCK)
    sinks = jnp.array([-2e4, 2e4, 0.0, 3.0, -3.0, 1.0])
    attend = partial(causal_attention, scale=1e3, path="chunked")
    o, pull = jax.jit(lambda *args: jax.vjp(lambda q: attend(q, *args[1:]), args[0]))(
        q, k, v, None, sinks
    )
    for a in (o, *pull(ct)):
        assert jnp.isfinite(a).all()
    assert abs(o[:, :, 1]).max() == 0 and abs(o[:, :, 0]).max() > 0.1


@pytest.mark.usefixtures("small_blocks")
def test_online_in_bfloat16_sums_in_float32() -> None:
    q, k, v, ct = draw(8 * BLOCK, batch=1)

    def run(dtype: str) -> tuple[jax.Array, ...]:
        attend = partial(causal_attention, scale=SCALE, path="chunked")
        args = [a.astype(dtype) for a in (q, k, v)]
        o, pull = jax.jit(partial(jax.vjp, attend))(*args)
        return o, *pull(ct.astype(dtype))

    for got, want in zip(run("bfloat16"), run("float32"), strict=True):
        assert got.dtype == jnp.bfloat16
        assert_close(got.astype(jnp.float32), want, tolerance=1e-2)


def temporaries(length: int) -> int:
    """Bytes beside inputs and outputs, forward and backward with everything on."""
    q, k, v, _ = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in shapes(length))
    documents = jax.ShapeDtypeStruct((1, length), jnp.int32)
    sinks = jax.ShapeDtypeStruct((4,), jnp.float32)

    def loss(q: Any, k: Any, v: Any, sinks: Any, documents: Any) -> jax.Array:
        return causal_attention(q, k, v, documents, sinks, scale=SCALE, soft_cap=30.0).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    program: Any = step.lower(q, k, v, sinks, documents).compile()
    return program.memory_analysis().temp_size_in_bytes


def shapes(length: int) -> Any:
    return jax.eval_shape(partial(draw, length, batch=1, n=4, k=2))


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    short, long = temporaries(2048), temporaries(8192)
    assert long < 4.2 * short, (short, long)
    assert long < 8192**2  # a quarter of one head's scores


# Kernels of others


SPLASH = {
    "everything": (
        150,  # two blocks of 128, of which 106 positions are padding
        {"window": 40, "soft_cap": 2.0, "documents": True, "sinks": True},
        {"n": 4, "k": 2, "u": 14, "batch": 2},
    ),
    "window over blocks": (300, {"window": 129, "documents": True}, {"n": 2, "k": 1, "batch": 1}),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_the_plain_einsum(name: str) -> None:
    """Interpreted."""
    features_equal_the_plain_einsum(partial(causal_attention, path="splash"), *SPLASH[name])


def test_splash_pads_little() -> None:
    """To the largest block for which the padding is an eighth at most."""
    want = {1: (128, 128), 128: (128, 128), 256: (256, 256), 300: (128, 384), 640: (128, 640)}
    want |= {500: (512, 512), 513: (128, 640), 4096: (512, 4096), 4097: (512, 4608)}
    assert {length: fused.splash_block(length) for length in want} == want


CUDNN = {
    "grouped": (37, {}, {}),
    "window 1": (20, {"window": 1}, {}),
    "window": (37, {"window": 5}, {"n": 3, "k": 1}),
    "narrow values": (20, {"window": 7}, {"u": 6}),
    "wide values": (20, {}, {"u": 18}),
}


@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_is_asked_for_the_plain_einsum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX promises of cuDNN, computed by JAX's own implementation of the same interface."""
    asked = jax.nn.dot_product_attention

    def stand_in(q: Any, k: Any, v: Any, *, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        return asked(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    features_equal_the_plain_einsum(partial(causal_attention, path="cudnn"), *CUDNN[name])


# In the model


MODEL = ModelConfig(
    d_model=12,
    n_heads=4,
    n_kv_heads=1,  # on all shards of `model`, so that its gradient is their sum
    d_head=6,
    attention_sinks=True,
    attention_soft_cap=5.0,
)


def gradients(path: str, monkeypatch: pytest.MonkeyPatch, **axes: int) -> Any:
    """The attention block's output, and gradients of its parameters and input, on a mesh."""
    monkeypatch.setattr(model, "pick", lambda *_, **__: path)
    batch, length = 4, 24
    specs, where = model.attention_specs(MODEL), on(**axes)
    params = jax.jit(lambda key: spec_lib.init(specs, key))(jax.random.key(0))
    params = params.replace(sinks_N=jnp.linspace(-1.0, 2.0, MODEL.n_heads))
    x, ct = jax.random.normal(jax.random.key(1), (2, batch, length, MODEL.d_model))
    rows = jnp.arange(length, dtype=jnp.int32)[None]

    def run(params: Any, x: Any, documents: Any, ct: Any) -> Any:
        turns = make_turns(rows, MODEL.rope, MODEL.rotary_width)
        places = model.Places(turns, documents)
        attend = lambda params, x: model.attention(params, x, places, MODEL, 11)
        y, pull = jax.vjp(attend, params, x)
        return y, pull(ct)

    with jax.set_mesh(where):
        inputs = put(where, (x, packed(batch, length), ct), TOKENS)
        return jax.jit(run)(put_params(where, params, specs), *inputs)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("path", ["chunked", "splash"])
def test_on_a_mesh_every_path_is_the_plain_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows over data, heads over model."""
    got = gradients(path, monkeypatch, data=2, model=2)
    monkeypatch.setattr(kernel, "LONG", LONG)
    want = gradients("chunked", monkeypatch)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        assert_close(g, w, tolerance=2e-5)


# Which path


PLAIN = Call(platform="gpu", dtype="bfloat16", width=128)
RULES = {
    "gpu": (PLAIN, "cudnn"),
    "widest": (replace(PLAIN, width=256), "cudnn"),
    "wider": (replace(PLAIN, width=257), "heads are at most 256 wide, and these are 257"),
    "before Hopper": (replace(PLAIN, hopper=False), "cudnn"),
    "wide before Hopper": (replace(PLAIN, hopper=False, width=129), "at most 128 wide before"),
    "float32": (replace(PLAIN, dtype="float32"), "bfloat16, not in model.dtype=float32"),
    "soft cap": (replace(PLAIN, soft_cap=True), "no model.attention_soft_cap"),
    "sinks": (replace(PLAIN, sinks=True), "nothing of model.attention_sinks"),
    "documents": (replace(PLAIN, documents=True), "data.document_mask"),
    "context": (replace(PLAIN, context=True), "whole sequences only, and mesh.context shards"),
    "another GPU": (replace(PLAIN, platform="an AMD GPU"), "needs a GPU, and this is an AMD GPU"),
    "cpu": (replace(PLAIN, platform="cpu"), "needs a GPU, and this is cpu"),
    "tpu": (
        Call(platform="tpu", dtype="float32", width=8, soft_cap=True, sinks=True, documents=True),
        "splash",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_fused_path_where_it_can_be_had(name: str) -> None:
    call, want = RULES[name]
    got = attention_paths.pick("auto", call)
    assert attention_paths.pick("chunked", call) == "chunked"
    if want in ("cudnn", "splash"):
        assert got == want == attention_paths.pick(want, call)
        return
    assert got == "chunked"
    assert want in (obstacle("cudnn", call) or "")
    with pytest.raises(UserError, match="model.attention_path=cudnn: ") as caught:
        attention_paths.pick("cudnn", call)
    assert want in str(caught.value) and "set it to auto" in str(caught.value)


def test_a_path_that_cannot_be_had_here_is_refused_when_traced() -> None:
    q, _, v, _ = draw(8)
    with pytest.raises(UserError, match="attention_path=splash: it needs a TPU, and this is cpu"):
        kernel.pick("splash", q, v, None, documents=False, sinks=False)
    assert kernel.pick("auto", q, v, None, documents=False, sinks=False) == "chunked"
    assert kernel.platform() == "cpu"
