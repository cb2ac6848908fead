"""The compiled step sends along no axis that the plan does not list, and along all it lists."""

from typing import Any

import meshes
import pytest

from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig
from jaxmoe.plan.aot import lower
from jaxmoe.plan.collectives import collectives
from jaxmoe.plan.hardware import find
from jaxmoe.plan.hlo import parse
from jaxmoe.plan.traffic import flows

MODEL = ModelConfig(
    vocab_size=512,
    d_model=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_ff=64,
    n_experts=8,
    top_k=2,
    loss_chunk=32,
)
MESHES: dict[str, dict[str, int]] = {
    "stage2_expert2_model2": {"stage": 2, "expert": 2, "model": 2},
    "replica2_data2_context2": {"replica": 2, "data": 2, "context": 2},
}
# Of all that is sent: sums of losses, norms and statistics are no flows of their own.
SMALL = 0.02


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "stage" in n else pytest.mark.slow) for n in MESHES]
)
def test_axes_of_the_compiled_step_are_those_of_the_plan(name: str) -> None:
    axes = MESHES[name]
    mesh = meshes.on(**axes)
    config = Config(
        model=MODEL,
        train=TrainConfig(batch_size=16, seq_len=128),
        mesh=MeshConfig(**{"data": 1, **axes}),
    )
    program: Any = lower(config, mesh).compile()
    found = collectives(parse(program.as_text()), mesh.shape)
    listed = {axis for flow in flows(config, dict(mesh.shape), find("h100")) for axis in flow.axes}
    total = sum(row.sent for row in found)
    sent = {axis for row in found if row.sent > SMALL * total for axis in row.axes}
    assert sent <= listed, [row for row in found if not set(row.axes) <= listed]
    assert listed <= {axis for row in found for axis in row.axes}
    assert sent, "it sends nothing, so nothing was compared"
