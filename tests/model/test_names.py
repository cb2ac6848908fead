"""Names with shape suffixes are true: a local `x_BLD` has three dims, and each letter one size.

Held while the train step is traced, at every return of a function in jaxmoe/model and
jaxmoe/kernels; so the check costs nothing at run time and needs no decorators.
"""

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
from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import Batch, eval_step, train_step

PACKAGE = Path(jaxmoe.__file__).parent
CHECKED = ("model", "kernels")
# Letters with an upper-case one among them, or at most two lower-case ones: `nll_sum` is a word.
SUFFIX = re.compile(r"[a-z0-9_]*_([A-Za-z]*[A-Z][A-Za-z]*|[a-z]{1,2})")

# Letters that always mean a size of the config. In kernels only some: batch and heads are shards.
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
    loss_chunk=8,
)
BATCH_SIZE, LENGTH = 8, 16
CONFIG = Config(model=MODEL, train=TrainConfig(batch_size=BATCH_SIZE, seq_len=LENGTH))
SIZES = {
    "B": BATCH_SIZE,
    "L": LENGTH,
    "D": MODEL.d_model,
    "N": MODEL.n_heads,
    "K": MODEL.n_kv_heads,
    "H": MODEL.d_head,
    "F": MODEL.d_ff,
    "E": MODEL.n_experts,
    "A": MODEL.top_k,
    "V": MODEL.vocab_size,
    "R": MODEL.n_layers,
}
FIXED = {"model": SIZES, "kernels": {letter: SIZES[letter] for letter in "LDHEAV"}}


class Names:
    """What was seen, and which names were not true."""

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.seen: set[tuple[str, str]] = set()
        self.untrue: list[str] = []

    def check(self, frame: FrameType) -> None:
        file = Path(frame.f_code.co_filename)
        where = f"{file.parent.name}/{file.name}:{frame.f_code.co_qualname}"
        self.functions.add(where)
        letters: dict[str, tuple[int, str]] = {}
        fixed = FIXED[file.parent.name]
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
def names_checked() -> Iterator[Names]:
    names = Names()

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


@pytest.fixture(scope="module")
def traced() -> Names:
    """The train step and the evaluation step, traced on an abstract mesh of 2 x 2 x 2."""
    mesh = mesh_lib.abstract(MeshConfig(data=2, expert=2, model=2), 8)
    rows = jax.NamedSharding(mesh, jax.P(mesh_lib.BATCH))
    batch = Batch(
        tokens_BL=jax.ShapeDtypeStruct((BATCH_SIZE, LENGTH + 1), jnp.int32, sharding=rows),
        weights_BL=jax.ShapeDtypeStruct((BATCH_SIZE, LENGTH), jnp.float32, sharding=rows),
    )
    with jax.sharding.use_abstract_mesh(mesh), names_checked() as names:
        state = abstract_state(CONFIG, mesh)
        jax.eval_shape(train_step, state, batch, CONFIG)
        jax.eval_shape(eval_step, state.params, batch, CONFIG)
    return names


def test_suffixes_are_true(traced: Names) -> None:
    assert not traced.untrue, "\n".join(sorted(set(traced.untrue)))


def test_the_whole_step_was_seen(traced: Names) -> None:
    """Traces are kept by JAX: sizes used nowhere else make sure that this one really ran."""
    functions = {where.split(":")[1] for where in traced.functions}
    wanted = "lm_loss attention causal_attention _attend rope moe route _switch _run _forward"
    wanted += " _to_experts _from_experts _from_slots_bwd _to_slots_bwd look_up _backward_at"
    assert set(wanted.split()) <= functions, set(wanted.split()) - functions
    assert len(traced.seen) > 120


def test_an_untrue_name_is_found() -> None:
    def f() -> FrameType:
        x_BLD = jnp.zeros((BATCH_SIZE, LENGTH, MODEL.d_model))
        y_LD = jnp.zeros((LENGTH, MODEL.d_model + 1))
        z_BD = jnp.zeros((BATCH_SIZE, LENGTH, MODEL.d_model))
        part_l = jnp.zeros(3)
        assert x_BLD.size and y_LD.size and z_BD.size and part_l.size
        return sys._getframe()

    names = Names()
    frame: Any = f()
    code = frame.f_code.replace(co_filename=str(PACKAGE / "model" / "made_up.py"))
    names.check(type("Frame", (), {"f_code": code, "f_locals": frame.f_locals})())  # type: ignore
    found = sorted(names.untrue)
    assert len(found) == 3, found
    assert "D is 28 in x_BLD, 29 in y_LD" in found[0]
    assert "y_LD: D is 28, not 29" in found[1]
    assert "z_BD has the shape (8, 16, 28)" in found[2]
