"""The whole train step for chips that are not here: no array of tokens x experts x ff, and no
float32 [tokens, vocabulary].

Run with an environment that has their compilers: python -m pytest -m aot tests/aot
"""

import re
from typing import Any

import absent
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig, replace
from jaxmoe.model.moe import path_of
from jaxmoe.plan import aot
from jaxmoe.run import xla

pytestmark = pytest.mark.aot

# The shape of the GPU target (benchmarks/README.md), with fewer layers: memory by layer is alike.
MODEL = ModelConfig(
    vocab_size=32_768,
    d_model=2048,
    n_layers=2,
    n_heads=16,
    n_kv_heads=16,
    d_head=128,
    d_ff=1024,
    n_experts=64,
    top_k=8,
    dtype="bfloat16",
    loss_chunk=256,
)
B, L = 2, 4096  # sequences of a device
ARRAY = re.compile(r"\b(f32|bf16|s32|u32|pred|u8|s8)\[([\d,]+)\]")


def compiled(kind: str, n: int, model: ModelConfig) -> Any:
    mesh = absent.mesh(kind, expert=n)
    train = TrainConfig(batch_size=n * B, seq_len=L)
    config = Config(model=model, train=train, mesh=MeshConfig(expert=n))
    with jax.set_mesh(mesh):
        assert path_of(model) == ("kernel" if model.expert_path == "auto" else model.expert_path)
    options = xla.OPTIONS["tpu" if kind.startswith("tpu") else "gpu"]
    return aot.lower(config, mesh).compile(compiler_options=dict(options))


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    return {(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in ARRAY.findall(text)}


@pytest.mark.parametrize("kind", ["h100:1x8", "tpu:v5p:2x2x1"])
@pytest.mark.parametrize("exchange", ["one device", "all_to_all", "all_gather", "ragged"])
def test_nothing_of_the_size_of_tokens_times_experts(kind: str, exchange: Any) -> None:
    n = 1 if exchange == "one device" else 4
    model = MODEL if n == 1 else replace(MODEL, expert_exchange=exchange)
    program = compiled(kind, n, model)
    m, tokens = model, B * L
    # The largest buffer of rows that may be: what suffices if one device's experts get everything.
    rows = tokens * n * min(m.top_k, m.n_experts // n) if n > 1 else tokens * m.top_k
    largest_weight = m.n_layers * m.n_experts // n * m.d_model * m.d_ff
    allowed = max(largest_weight, rows * m.d_model, m.vocab_size * m.d_model)
    for dtype, dims in arrays(program.as_text()):
        size = int(np.prod(dims, dtype=np.int64))
        assert size <= allowed, (dtype, dims)
        assert size < tokens * m.n_experts * m.d_ff, (dtype, dims)
        whole = dtype == "f32" and m.vocab_size in dims and size >= tokens * m.vocab_size
        assert not whole, (dtype, dims)
    memory = program.memory_analysis()
    print(kind, exchange, f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB")


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_every_option_is_known(backend: str) -> None:
    kind = {"gpu": "h100:1x8", "tpu": "tpu:v5p:2x2x1"}[backend]
    one = NamedSharding(absent.mesh(kind, data=1), P())
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=one)
    lowered = jax.jit(lambda x: x + 1).lower(x)
    lowered.compile(compiler_options=dict(xla.OPTIONS[backend]))
