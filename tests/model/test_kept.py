"""What layers keep for the backward pass: the memory of a step is one layer's times their number.

Read off the traced step: what the forward scan over layers stacks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig
from jaxmoe.run.state import abstract_state
from jaxmoe.run.step import abstract_batch, train_step

R, B, L = 5, 8, 12
MODEL = ModelConfig(
    vocab_size=42,
    d_model=24,
    n_layers=R,
    n_heads=10,
    n_kv_heads=2,
    d_head=6,
    d_ff=14,
    n_experts=16,
    top_k=3,
    loss_chunk=4,
    dtype="bfloat16",
)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(batch_size=B, seq_len=L),
    mesh=MeshConfig(data=2, expert=2, model=2),
)


def scans(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        else:
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


@functools.cache
def kept() -> list[Any]:
    """Types of what the first scan over layers stacks."""
    mesh = mesh_lib.abstract(CONFIG.mesh, 8)
    batch = abstract_batch(CONFIG, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = train_step.trace(abstract_state(CONFIG, mesh), batch, CONFIG).jaxpr
    layers = next(eqn for eqn in scans(jaxpr.jaxpr) if eqn.params["length"] == R)
    return [v.aval for v in layers.outvars[layers.params["num_carry"] :]]


def test_two_residual_streams_spread_over_model_and_attentions_output() -> None:
    """Not what the norms make of the stream in float32, nor its copies on the shards of `model`,
    nor gathered weights: the experts' own VJP would keep them, were they not rematerialised."""
    streams = [a for a in kept() if a.shape == (R, B, L, MODEL.d_model)]
    assert [a.dtype for a in streams] == [jnp.bfloat16] * 2
    assert [a.sharding.spec[2] for a in streams] == [("context", "model")] * 2
    output = R * B * L * MODEL.n_heads * MODEL.d_head
    (attention,) = [a for a in kept() if a.size == output]
    assert attention.dtype == jnp.bfloat16
    # What is left: log-sum-exps and the router's sums.
    others = [a for a in kept() if a.size not in (output, streams[0].size)]
    assert max(a.size for a in others) == R * B * L * MODEL.n_heads
