"""Names with shape suffixes are true: a local `x_BLD` has three dims, and each letter one size.

Held while the train step is traced, at every return of a function in jaxmoe/model and
jaxmoe/kernels; so the check costs nothing at run time and needs no decorators.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxmoe
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import (
    Config,
    DataConfig,
    MeshConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
)
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import abstract_batch, eval_step, train_step

PACKAGE = Path(jaxmoe.__file__).parent
CHECKED = ("model", "kernels")
# Letters with an upper-case one among them, or at most two lower-case ones: `nll_sum` is a word.
SUFFIX = re.compile(r"[a-z0-9_]*_([A-Za-z]*[A-Z][A-Za-z]*|[a-z]{1,2})")

# Every dim has a size of its own. Between them these models have all that the family can do.
MODEL = ModelConfig(
    vocab_size=62,
    d_model=28,
    n_layers=3,
    n_heads=10,
    n_kv_heads=2,
    d_head=6,
    d_ff=18,
    n_experts=12,
    top_k=5,
    expert_path="batched",
    loss_chunk=8,
)
LATENT = ModelConfig(
    vocab_size=62,
    d_model=28,
    n_layers=5,
    n_heads=10,
    n_kv_heads=10,
    mla=MlaConfig(q_rank=20, kv_rank=24, d_nope=7, d_rope=4, d_value=9),
    d_ff=18,
    n_experts=36,
    top_k=5,
    expert_path="blocked",
    n_shared_experts=3,
    first_dense=2,
    d_ff_dense=54,
    router=RouterConfig(
        score="sigmoid",
        n_groups=6,
        top_k_groups=3,
        jitter=0.1,
        balance_bias_rate=0.1,
        load_balance_scope="sequence",
    ),
    rope=RopeConfig(scaling="yarn", factor=2.0),
    n_mtp=1,
    loss_chunk=8,
)
SUNK = ModelConfig(
    vocab_size=62,
    d_model=28,
    n_layers=3,
    n_heads=10,
    n_kv_heads=1,
    d_head=6,
    qk_norm="full",
    attention_bias=True,
    attention_sinks=True,
    attention_soft_cap=5.0,
    sliding_window=5,
    global_every=3,
    d_ff=18,
    n_experts=12,
    top_k=5,
    activation="clamped_swiglu",
    expert_bias=True,
    expert_path="kernel",
    expert_exchange="ragged",
    router=RouterConfig(bias=True, load_balance_scope="microbatch"),
    tie_embeddings=True,
    logit_soft_cap=9.0,
    loss_chunk=8,
)
BATCH_SIZE, LENGTH = 8, 16
RING = ModelConfig(
    vocab_size=62,
    d_model=28,
    n_layers=2,
    n_heads=10,
    n_kv_heads=2,
    d_head=6,
    d_ff=18,
    n_experts=12,
    top_k=5,
    sliding_window=9,
    attention_sinks=True,
    context_attention="ring",
    router=RouterConfig(jitter=0.1),
    n_mtp=1,
    loss_chunk=4,
)
GATHER = dataclasses.replace(RING, n_experts=1, top_k=1, context_attention="gather")
MODELS = {
    "uniform": (MODEL, False),
    "latent": (LATENT, True),
    "sunk": (SUNK, False),
    "ring": (RING, True),
    "gather": (GATHER, False),
}
KERNELS = "LDEAV"  # letters that are sizes of the config there: batch and heads are shards


def sizes_of(m: ModelConfig) -> dict[str, int]:
    """Letters that always mean a size of the config. F is that of an expert, a dense layer or a
    shared expert, and R that of a segment, so these two only agree within a function."""
    sizes = {"B": BATCH_SIZE, "L": LENGTH, "D": m.d_model, "V": m.vocab_size}
    sizes |= {"N": m.n_heads, "E": m.n_experts, "A": m.top_k}
    r, mla = m.router, m.mla
    sizes |= {"P": r.n_groups, "O": m.n_experts // r.n_groups}
    if mla is None:
        return {**sizes, "K": m.n_kv_heads, "H": m.d_head, "U": m.d_head}
    sizes |= {"Q": mla.q_rank, "J": mla.kv_rank, "I": mla.d_nope, "W": mla.d_rope}
    return {**sizes, "U": mla.d_value}  # H is a head's width, and to rope that of its rotary part


class Names:
    """What was seen, and which names were not true."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.fixed = {"model": sizes, "kernels": {k: v for k, v in sizes.items() if k in KERNELS}}
        self.functions: set[str] = set()
        self.seen: set[tuple[str, str]] = set()
        self.untrue: list[str] = []

    def check(self, frame: FrameType) -> None:
        file = Path(frame.f_code.co_filename)
        where = f"{file.parent.name}/{file.name}:{frame.f_code.co_qualname}"
        self.functions.add(where)
        letters: dict[str, tuple[int, str]] = {}
        # There D and F are any two widths, and E the groups of one device.
        free = file.name.startswith("grouped_")
        fixed = {} if free else self.fixed[file.parent.name]
        for name, value in sorted(frame.f_locals.items()):
            match = SUFFIX.fullmatch(name)
            shape = getattr(value, "shape", None)
            if match is None or not isinstance(shape, tuple):
                continue
            self.seen.add((where, name))
            if len(shape) != len(match[1]):
                self.untrue.append(f"{where}: {name} has the shape {shape}")
                continue
            for letter, size in zip(match[1], shape, strict=True):
                known, by = letters.setdefault(letter, (size, name))
                if size != known:
                    self.untrue.append(f"{where}: {letter} is {known} in {by}, {size} in {name}")
                if size != fixed.get(letter, size):
                    self.untrue.append(f"{where}: {name}: {letter} is {fixed[letter]}, not {size}")


@contextmanager
def names_checked(model: ModelConfig) -> Iterator[Names]:
    names = Names(sizes_of(model))

    files = {str(f) for folder in CHECKED for f in (PACKAGE / folder).glob("*.py")}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code.co_filename in files:
            names.check(frame)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield names
    finally:
        sys.setprofile(before)


@functools.cache
def traced(name: str) -> Names:
    """The train step and the evaluation step, traced on an abstract mesh of 2 x 2 x 2: with
    experts in three ways, and with sequences on two devices."""
    model, has_documents = MODELS[name]
    config = Config(
        model=model,
        data=DataConfig(document_mask=has_documents),
        train=TrainConfig(batch_size=BATCH_SIZE, seq_len=LENGTH),
    )
    axes = {"context": 2} if name in ("ring", "gather") else {"expert": 2}
    mesh = mesh_lib.abstract(MeshConfig(data=2, model=2, **axes), 8)
    batch = abstract_batch(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh), names_checked(model) as names:
        state = abstract_state(config, mesh)
        jax.eval_shape(train_step, state, batch, config)
        jax.eval_shape(eval_step, state.params, batch, config)
    return names


@pytest.mark.parametrize("name", MODELS)
def test_suffixes_are_true(name: str) -> None:
    untrue = traced(name).untrue
    assert not untrue, "\n".join(sorted(set(untrue)))


STEP = "lm_loss attention _attend _matmuls rope make_turns _forward look_up positions make_places"
EXPERTS = "route _switch make_order"
SHARDED = "context_attention ring_attention look gradients"
BATCHED = "_batched _ffn to_experts from_experts _from_slots_bwd _to_slots_bwd slot_plan"
BLOCKED = "_through _through_backward grouped grouped_gradients _into _out _pack sum_of_slots"
BLOCKED += " packed_places"
SEEN = {
    "uniform": f"{EXPERTS} {BATCHED} _grouped_qkv _summed moe causal_attention",
    "latent": f"{EXPERTS} {BLOCKED} _AllGather.rows _AllGather.sum_back _mla_qkv _mtp _ahead"
    " _same_document balanced _jittered _choose ffn",
    "ring": f"{EXPERTS} {SHARDED} _jittered _ahead",
    "gather": f"{SHARDED} _gathered.<locals>.one _scattered.<locals>.one",
    "sunk": f"{EXPERTS} _of_its_expert grouped_matmul _Ragged._send _Ragged._return _summed"
    " soft_capped activate",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_step_was_seen(name: str) -> None:
    """Traces are kept by JAX: sizes used nowhere else make sure that this one really ran."""
    names = traced(name)
    functions = {where.split(":")[1] for where in names.functions}
    wanted = set(f"{STEP} {SEEN[name]}".split())
    assert wanted <= functions, wanted - functions
    assert len(names.seen) > 120


def test_an_untrue_name_is_found() -> None:
    def f() -> FrameType:
        x_BLD = jnp.zeros((BATCH_SIZE, LENGTH, MODEL.d_model))
        y_LD = jnp.zeros((LENGTH, MODEL.d_model + 1))
        z_BD = jnp.zeros((BATCH_SIZE, LENGTH, MODEL.d_model))
        part_l = jnp.zeros(3)
        assert x_BLD.size and y_LD.size and z_BD.size and part_l.size
        return sys._getframe()

    names = Names(sizes_of(MODEL))
    frame: Any = f()
    code = frame.f_code.replace(co_filename=str(PACKAGE / "model" / "made_up.py"))
    names.check(type("Frame", (), {"f_code": code, "f_locals": frame.f_locals})())  # type: ignore
    found = sorted(names.untrue)
    assert len(found) == 3, found
    assert "D is 28 in x_BLD, 29 in y_LD" in found[0]
    assert "y_LD: D is 28, not 29" in found[1]
    assert "z_BD has the shape (8, 16, 28)" in found[2]
