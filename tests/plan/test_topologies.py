"""What a user may ask to compile for, and how meshes lie on slices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import MeshConfig
from jaxmoe.errors import UserError
from jaxmoe.plan import topologies
from jaxmoe.plan.topologies import parse


def test_targets() -> None:
    pod = parse("tpu:v5p:16x16x16")
    assert (pod.chip, pod.shape, pod.slices, pod.n_devices) == ("v5p", (16, 16, 16), 1, 4096)
    assert (pod.backend, round(pod.hbm / 2**30, 2)) == ("tpu", 95.74)
    two = parse("tpu:v6e:4x8:2")
    assert (two.slices, two.n_devices) == (2, 64)
    gpus = parse("h100:64x8")
    assert (gpus.backend, gpus.n_devices, gpus.hbm) == ("gpu", 512, 84_942_979_072)


@pytest.mark.parametrize(
    "text",
    [
        *("", "h100", "tpu", "tpu:v5p", "tpu:h100:2x8", "v5p:2x2x2", "b200:2x8", "h100:2x8:2"),
        *("h100:2x8x8", "tpu:v5p:16x16", "tpu:v5e:4x4x4", "tpu:v5p:0x2x2", "tpu:v5p:2x2x2:0"),
        *("h100:-1x8", "tpu:v5p:2x2x2:2:2"),
    ],
)
def test_a_target_that_is_not_one(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    for part in (f"--compile {text}:", "tpu:v5p:XxYxZ", "tpu:v5e:XxY", "h100:HOSTSxGPUS"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "extra"), [("tpu:v5p:2x2x2", "aot-tpu"), ("h100:1x8", "aot-cuda")]
)
def test_a_missing_compiler_names_its_extra(
    text: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"not installed; pip install 'jaxmoe\[{extra}\]'"):
        topologies.devices(parse(text))


def test_h200_differs_from_h100_in_memory_and_name() -> None:
    h100, h200 = (topologies.gpu_target(chip) for chip in ("h100", "h200"))
    changed = [pair for pair in zip(h100.split(), h200.split(), strict=False) if len(set(pair)) > 1]
    assert len(changed) >= 3 and f"device_memory_size: {parse('h200:1x8').hbm}" in h200
    assert "H100" not in h200 and "core_count: 132" in h200


@dataclass(frozen=True)
class Fake:
    """What mesh_utils asks of a GPU."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "none"


def grid_of(config: MeshConfig, devices: Any) -> np.ndarray:
    return np.vectorize(lambda d: d.slice_index)(
        mesh_lib.arranged(tuple(mesh_lib.sizes(config, len(devices)).values()), devices)
    )


def test_slow_links_go_to_the_first_axes() -> None:
    """Whatever order devices come in: neighbours on inner axes share a slice."""
    devices = [Fake(id=i, slice_index=i % 4, process_index=i % 4) for i in range(32)]
    grid = grid_of(MeshConfig(replica=4, data=4, model=2), devices)
    assert [set(part.flat) for part in grid] == [{0}, {1}, {2}, {3}]
    # replica takes half of the slices' factor, data the rest.
    grid = grid_of(MeshConfig(replica=2, data=4, expert=2, model=2), devices)
    halves = grid[:, 0, :, 0].reshape(2, 2, -1)
    assert [[set(part) for part in row] for row in halves] == [[{0}, {1}], [{2}, {3}]]
    assert mesh_lib.across((6, 1, 2, 1, 1, 2), 4) == (2, 1, 2, 1, 1, 1)
    with pytest.raises(UserError, match="3 slices cannot share the mesh replica=4 x data=4"):
        mesh_lib.across((4, 1, 4, 1, 1, 1), 3)


def test_the_product_must_be_the_device_count_on_slices_too() -> None:
    devices = [Fake(id=i, slice_index=i // 4, process_index=0) for i in range(8)]
    with pytest.raises(UserError, match="needs 4 devices, but there are 8"):
        mesh_lib.over(MeshConfig(replica=2, data=2), devices)
