"""What attention compiles to for chips that are not here: fused kernels, and no [L, L] array.

Run with an environment that has their compilers: python -m pytest -m aot tests/aot
"""

import re
from typing import Any

import absent
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import MlaConfig, ModelConfig, replace
from jaxmoe.kernels import fused
from jaxmoe.model.attention import Places, attention, attention_specs
from jaxmoe.model.rope import make_turns
from jaxmoe.spec import map_specs

pytestmark = pytest.mark.aot

B, L, D = 4, 4096, 256
CFG = ModelConfig(
    d_model=D,
    n_heads=16,
    n_kv_heads=4,
    d_head=128,
    dtype="bfloat16",
    qk_norm="none",
)
MLA = replace(
    CFG, n_kv_heads=16, mla=MlaConfig(q_rank=64, kv_rank=64, d_nope=128, d_rope=64, d_value=128)
)
SUNK = replace(CFG, attention_sinks=True, attention_soft_cap=30.0)


def compiled(
    target: str, cfg: ModelConfig, window: int | None, documents: bool, length: int = L
) -> Any:
    """The attention block, forward and backward, on data=2 x model=2."""
    mesh = absent.mesh(target, data=2, model=2)

    def shaped(shape: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def parameter(spec: Any) -> Any:
        dtype = jnp.bfloat16 if spec.cast else jnp.float32
        return shaped(spec.shape, dtype, mesh_lib.partition(spec, mesh_lib.COMPUTE))

    rows = P(mesh_lib.BATCH, "context")
    x = shaped((B, length, D), jnp.bfloat16, rows)
    documents_BL = shaped((B, length), jnp.int32, rows) if documents else None

    def gradients(params: Any, x_BLD: Any, documents_BL: Any) -> Any:
        positions_1L = jnp.arange(length, dtype=jnp.int32)[None]
        turns = make_turns(positions_1L, cfg.rope, cfg.rotary_width)
        places = Places(turns, documents_BL)

        def loss(params: Any, x_BLD: Any) -> Any:
            return attention(params, x_BLD, places, cfg, window).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x_BLD)

    params = map_specs(parameter, attention_specs(cfg))
    with jax.set_mesh(mesh):
        return jax.jit(gradients).lower(params, x, documents_BL).compile()


def squares(text: str, length: int = L) -> set[str]:
    """Arrays with two dims of a whole length."""
    return set(re.findall(rf"\w+\[(?:\d+,)*{length},(?:\d+,)*{length}\b[\d,]*\]", text))


def calls(text: str) -> list[str]:
    return re.findall(r'custom_call_target="([^"]+)"', text)


@pytest.mark.parametrize("window", [None, 1024])
def test_h100_runs_cudnn_forward_and_backward(window: int | None) -> None:
    text = compiled("h100:1x8", CFG, window, documents=False).as_text()
    assert "__cudnn$fmhaSoftmax" in calls(text)
    assert "__cudnn$fmhaSoftmaxBackward" in calls(text)
    assert not squares(text)
    lengths = set(re.findall(r'"sliding_window_length": ?(\d+)', text))
    assert lengths == {str(window or 0)}  # cuDNN counts the own position too


@pytest.mark.parametrize("name", ["documents", "sinks", "wide heads"])
def test_h100_has_a_linear_way_for_what_cudnn_cannot_do(name: str) -> None:
    cfg = {"documents": CFG, "sinks": SUNK, "wide heads": MLA}[name]
    target = "h100:1x8"
    program = compiled(target, cfg, 1024, documents=name == "documents")
    assert not [call for call in calls(program.as_text()) if "fmha" in call]
    assert not squares(program.as_text())
    twice = compiled(target, cfg, 1024, documents=name == "documents", length=2 * L)
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (program, twice)]
    assert sizes[1] < 2.2 * sizes[0], sizes


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1024])
def test_tpu_runs_splash(window: int | None, documents: bool) -> None:
    text = compiled("tpu:v5p:2x2x1", CFG, window, documents).as_text()
    kernels = set(re.findall(r"splash_mha_(fwd|dq|dkv)", text))
    assert kernels == {"fwd", "dq", "dkv"} and "tpu_custom_call" in calls(text)
    assert not squares(text)


@pytest.mark.parametrize("name", ["sinks", "latent", "a length of no blocks"])
def test_tpu_runs_splash_for_all_the_rest(name: str) -> None:
    cfg = {"sinks": SUNK, "latent": MLA}.get(name, CFG)
    length = L + 1 if name == "a length of no blocks" else L
    text = compiled("tpu:v5p:2x2x1", cfg, None, documents=True, length=length).as_text()
    assert set(re.findall(r"splash_mha_(fwd|dq|dkv)", text)) == {"fwd", "dq", "dkv"}
    for size in (length, fused.splash_block(length)[1]):
        assert not squares(text, size)
