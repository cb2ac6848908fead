"""The compiled step sends along no axis that the plan does not list, along all it lists, and over
`expert` as much as it says."""

import functools
from typing import Any

import meshes
import pytest

from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig, replace
from jaxmoe.plan.aot import lower
from jaxmoe.plan.collectives import Row, collectives
from jaxmoe.plan.hardware import find
from jaxmoe.plan.hlo import parse
from jaxmoe.plan.traffic import Flow, flows

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
    "data2_expert2_model2": {"data": 2, "expert": 2, "model": 2},
}
# Of all that is sent: sums of losses, norms and statistics are no flows of their own.
SMALL = 0.02
# Of what goes over `expert`: numbers of rows by expert, which the plan leaves out.
LOADS = 0.001


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "context" in n else ()) for n in MESHES]
)
def test_axes_of_the_compiled_step_are_those_of_the_plan(name: str) -> None:
    found, planned = compiled_and_planned(name)
    listed = {axis for flow in planned for axis in flow.axes}
    total = sum(row.sent for row in found)
    sent = {axis for row in found if row.sent > SMALL * total for axis in row.axes}
    assert sent <= listed, [row for row in found if not set(row.axes) <= listed]
    assert listed <= {axis for row in found for axis in row.axes}
    assert sent, "it sends nothing, so nothing was compared"


@pytest.mark.parametrize("kind", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_bytes_over_expert_are_those_of_the_plan(kind: str) -> None:
    """Rows there and back are sent by each shard of `model` for its own; and as much as the plan
    says is brought together over `model`. But for loads, which are whole numbers by expert."""
    found, planned = compiled_and_planned("data2_expert2_model2", kind)
    by_kind = {flow.kind: flow for flow in planned}
    rows = by_kind["rows to experts and back"]
    assert rows.axes == ("expert",)
    over = [row for row in found if row.axes == ("expert",)]
    assert sum(row.sent for row in over) == pytest.approx(rows.sent, rel=LOADS)
    # Sums over heads and width are all-reduces on CPU, and these the only reduce-scatters: two of
    # five ways, with other numbers beside the rows.
    scattered = [r for r in found if r.axes == ("model",) and r.kind == "reduce-scatter"]
    together = by_kind["experts' rows together"].sent
    assert sum(row.sent for row in scattered) == pytest.approx(2 / 5 * together, rel=0.02)


def test_bytes_of_a_pipelines_items_are_those_of_the_plan() -> None:
    """Items are computed once more than layers without a pipeline. The compiled step's bubbles
    count as if they were busy: 5 iterations for 4 items."""
    found, planned = compiled_and_planned("stage2_expert2_model2")
    by_kind = {flow.kind: flow.sent for flow in planned}
    rows = sum(row.sent for row in found if row.kind == "all-to-all")
    assert rows == pytest.approx(5 / 4 * by_kind["rows to experts and back"], rel=LOADS)
    permuted = sum(row.sent for row in found if row.kind == "collective-permute")
    assert permuted == pytest.approx(5 / 4 * by_kind["activations to the next stage"])


@pytest.mark.parametrize("way", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
def test_bytes_of_keys_are_those_of_the_plan(way: Any) -> None:
    """Keys, values and float32 gradients; weights are gathered beside them, alike by both ways."""
    dense = replace(MODEL, n_layers=2, n_experts=1, top_k=1, context_attention=way)
    found, planned = of_step(dense, {"context": 2})
    by_kind = {flow.kind: flow.sent for flow in planned}
    keys = by_kind["keys and values around the ring"]
    passed = sum(row.sent for row in found if row.kind == "collective-permute")
    if way == "ring":
        assert passed == keys
        return
    gathered = sum(r.sent for r in found if r.kind in ("all-gather", "reduce-scatter"))
    ring, _ = of_step(replace(dense, context_attention="ring"), {"context": 2})
    weights = sum(row.sent for row in ring if row.kind == "all-gather")
    assert passed == 0 and gathered - weights == keys


@functools.cache
def compiled_and_planned(name: str, kind: Any = "all_to_all") -> tuple[list[Row], list[Flow]]:
    """Collectives of the train step with this exchange, and the plan's traffic."""
    return of_step(replace(MODEL, expert_exchange=kind), MESHES[name])


def of_step(model: ModelConfig, axes: dict[str, int]) -> tuple[list[Row], list[Flow]]:
    mesh = meshes.on(**axes)
    config = Config(
        model=model,
        train=TrainConfig(batch_size=16, seq_len=128),
        mesh=MeshConfig(**{"data": 1, **axes}),
    )
    program: Any = lower(config, mesh).compile()
    found = collectives(parse(program.as_text()), mesh.shape)
    return found, flows(config, dict(mesh.shape), find("h100"))
