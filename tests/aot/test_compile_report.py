"""Reports on programs for chips that are not here, and what is asked for wrongly.

Run with an environment that has their compilers: python -m pytest -m aot tests/aot
"""

import dataclasses
import functools
import io
import json
import re
from typing import Any

import pytest
from absent import need
from rich.console import Console

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig, replace
from jaxmoe.plan import aot, hlo, topologies
from jaxmoe.plan.aot import CompileReport, compile_report
from jaxmoe.plan.collectives import SLICES

pytestmark = pytest.mark.aot

MODEL = ModelConfig(
    vocab_size=1024,
    d_model=512,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=128,
    d_ff=256,
    n_experts=8,
    top_k=2,
    dtype="bfloat16",
    loss_chunk=128,
)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(batch_size=16, seq_len=1024),
    mesh=MeshConfig(replica=2, data=2, expert=2, model=2),
)
TARGETS = {"h100:2x8": "gpu", "tpu:v5p:2x2x2:2": "tpu"}


def gathered(report: CompileReport, *axes: str) -> int:
    """Bytes of bfloat16, whole."""
    kinds = ("all-gather", axes, "bf16")
    return sum(r.bytes for r in report.collectives if (r.kind, r.axes, r.dtype) == kinds)


@functools.cache
def made(target: str) -> CompileReport:
    need(TARGETS[target])
    return compile_report(CONFIG, target)


@pytest.fixture(params=TARGETS)
def report(request: Any) -> CompileReport:
    return made(request.param)


def test_memory_and_traffic(report: CompileReport) -> None:
    assert report.fits and report.memory is not None and report.refusal is None
    assert report.n_devices == 16 and report.mesh["replica"] == 2
    # Parameters and moments, 12 bytes each, over all but `replica`; norms and router are whole.
    assert report.memory.arguments == pytest.approx(report.memory.aliased, rel=0.01)
    layers, half = MODEL.n_layers, 2  # of the mesh axes in use each is 2
    # Experts' weights rest over data too, and are gathered for each layer there and back; libtpu
    # gathers them once more for a small program like this.
    weights = layers * 3 * MODEL.n_experts // half * MODEL.d_model * MODEL.d_ff // half * 2
    assert gathered(report, "data") in (2 * weights, 3 * weights)
    # The residual stream lies spread over `model`, and is gathered for both blocks of a layer: in
    # the forward pass, again for the backward one, and its gradient there.
    stream = 16 // 8 * 1024 * MODEL.d_model * 2
    assert 6 * layers * stream <= gathered(report, "model") <= 7 * layers * stream
    assert gathered(report, "data", "expert") > 0
    # Gradients of replicas are summed; between slices of TPUs hosts do it.
    across = {row.kind for row in report.collectives if {"replica", SLICES} & set(row.axes)}
    assert across & {"all-reduce", "reduce-scatter", "send"}
    assert ("send" in across) == report.target.startswith("tpu")
    assert not report.blow_ups and report.largest
    assert not any(row.partial for row in report.collectives)


def test_it_is_json_and_a_page(report: CompileReport) -> None:
    read = json.loads(json.dumps(dataclasses.asdict(report)))
    assert read["memory"]["temporaries"] == report.memory.temporaries  # type: ignore[union-attr]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(aot.render(report))
    text = console.export_text()
    assert "replica=2 x data=2 x expert=2 x model=2" in text and "all-gather" in text
    assert re.search(r"fits\W+yes", text)


def test_what_does_not_fit_is_an_answer() -> None:
    need("tpu")
    large = replace(MODEL, n_layers=4, d_model=16_384, d_ff=32_768)
    config = replace(CONFIG, model=large, mesh=MeshConfig(), train=TrainConfig(batch_size=4))
    got = compile_report(config, "tpu:v5e:2x2")
    assert not got.fits and got.memory is None and "hbm" in (got.refusal or "").lower()
    assert not got.collectives


def test_slices_go_to_replica() -> None:
    need("tpu")
    chips = topologies.devices(topologies.parse("tpu:v5p:2x2x2:2"))
    assert {chip.slice_index for chip in chips} == {0, 1}
    grid = mesh_lib.over(MeshConfig(replica=2, data=4, model=2), chips).devices
    of = [[chip.slice_index for chip in half.flat] for half in grid]
    assert of == [[0] * 8, [1] * 8]
    # On one slice, neighbours on the last axis are neighbours in space.
    chips = topologies.devices(topologies.parse("tpu:v5p:4x4x4"))
    grid = mesh_lib.over(MeshConfig(data=16, model=4), chips).devices.reshape(16, 4)
    for row in grid:
        assert sum(len({chip.coords[i] for chip in row}) > 1 for i in range(3)) == 1


def test_a_dense_layer_of_all_experts_is_found() -> None:
    need("tpu")
    mesh = mesh_lib.over(CONFIG.mesh, topologies.devices(topologies.parse("tpu:v5p:2x2x4")))
    t, e, f = 16 * 1024 // 8, MODEL.n_experts, MODEL.d_ff // 2
    program = "ENTRY %main (a: f32[4]) -> f32[4] {\n  %x = bf16[DIMS]{1,0} fusion(%a)\n}\n"
    for dims, bad in {f"{t},{e * f}": 1, f"{t},{e},{f // 2}": 0, f"{e * t},{f}": 1}.items():
        found = list(aot.blow_ups(hlo.parse(program.replace("DIMS", dims)), CONFIG, mesh))
        assert len(found) == bad, dims
