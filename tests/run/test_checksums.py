"""Copies of the state that are compared: which flips are found, and how they are named."""

from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import on
from rehearsal import configured, rehearse

from jaxmoe import tree
from jaxmoe.config import FaultConfig, HealthConfig, replace
from jaxmoe.run.checksums import Checksums
from jaxmoe.run.faults import flipped
from jaxmoe.run.health import Corrupted
from jaxmoe.run.state import init_state

FLIPS = 200


@pytest.mark.parametrize(
    ("axes", "named"),
    [({"replica": 4}, 1), ({"replica": 2, "data": 2, "expert": 2}, 2)],
    ids=["four copies", "two copies"],
)
def test_every_flip_of_a_copy_is_found_and_named(
    axes: dict[str, int], named: int, text_cache: Path
) -> None:
    """Exponent and sign bits, of parameters and moments; by a majority of four the very device."""
    mesh, rng = on(**axes), np.random.default_rng(1)
    with jax.set_mesh(mesh):
        state = init_state(configured(text_cache, axes=axes), mesh)
        sums = Checksums(mesh, state)
        assert sums.share == pytest.approx(1.0, abs=0.01)
        assert not [*sums.mismatches(sums.of(state))]
        arrays = [n for n, a in tree.named_leaves(state) if a.dtype == np.float32 and a.ndim]
        found = 0
        for _ in range(FLIPS):
            name, device = str(rng.choice(arrays)), mesh.devices.flat[rng.integers(mesh.size)]
            index, bit = int(rng.integers(10**6)), int(rng.integers(23, 32))
            bent = flipped(state, name, device, index, bit)
            told = [*sums.mismatches(sums.of(bent))]
            if [one.name for one in told] == [name] and len(told[0].suspects) <= named:
                found += str(device) in told[0].suspects
        assert found == FLIPS


def test_what_one_device_alone_holds_is_not_compared(text_cache: Path) -> None:
    """Fully sharded parameters have no copy: `share` says how little is compared."""
    axes = {"data": 2, "expert": 4}
    mesh = on(**axes)
    with jax.set_mesh(mesh):
        sums = Checksums(mesh, init_state(configured(text_cache, axes=axes), mesh))
        assert 0 < sums.share < 0.2
    one = on(data=1)
    with jax.set_mesh(one):
        assert Checksums(one, init_state(configured(text_cache), one)).share == 0


def test_a_flipped_parameter_ends_the_run_before_it_is_saved(
    text_cache: Path, tmp_path: Path
) -> None:
    """The same command goes on from the checkpoint of before, and nothing is lost."""
    axes = {"replica": 2, "data": 2}
    flip = FaultConfig(kind="flip-parameter", step=14, device=3, array="router", bit=24, index=7)
    health = HealthConfig(checksum_every=5)
    own = {"axes": axes, "health": health}
    ended = rehearse(tmp_path / "run", text_cache, flip, **own)
    assert isinstance(ended.error, Corrupted)
    step, why = ended.told("corruption")
    assert step == 15 and why.startswith("copies differ after step 15: params/layers/")
    assert "router" in why and "cpu:3" in why
    assert [row["step"] for row in ended.events("checkpoint")] == [6, 12]
    again = rehearse(tmp_path / "run", text_cache, flip, **own)
    sound = rehearse(tmp_path / "sound", text_cache, **own)
    assert again.error is sound.error is None and len(again.events("corruption")) == 1
    assert again.metrics == sound.metrics
    # That of step 14, by the wrong parameters, stays in the file; the later line of a step counts.
    assert len(again.evals) == len(sound.evals) + 1
    assert {row["step"]: row for row in again.evals} == {row["step"]: row for row in sound.evals}


def test_a_flip_between_two_comparisons_is_found_before_the_save(
    text_cache: Path, tmp_path: Path
) -> None:
    flip = FaultConfig(kind="flip-parameter", step=11, device=1, bit=30)
    ended = rehearse(tmp_path / "run", text_cache, flip, axes={"replica": 2}, health=HealthConfig())
    assert isinstance(ended.error, Corrupted) and ended.told("corruption")[0] == 12
    assert [row["step"] for row in ended.events("checkpoint")] == [6]
    off = replace(HealthConfig(), checksum_every=0)
    blind = rehearse(tmp_path / "blind", text_cache, flip, axes={"replica": 2}, health=off)
    assert not isinstance(blind.error, Corrupted)
