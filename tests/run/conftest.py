"""One run that is killed again and again; its copies at a kill serve several tests."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, Mesh
from processes import Killed, kill_group, logged, on_terminal, started, train, wait_until

from jaxmoe import mesh as mesh_lib

KILLS = random.Random(5)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One device, for tests that train in this process."""
    axes = mesh_lib.AXES
    devices, types = jax.devices()[:1], (AxisType.Explicit,) * len(axes)
    one = jax.make_mesh((1,) * len(axes), axes, axis_types=types, devices=devices)
    with jax.set_mesh(one):
        yield one


@pytest.fixture(scope="session")
def killed(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Killed early, between two checkpoints, and while one is being written; then finished on a
    terminal."""
    folder = tmp_path_factory.mktemp("killed")
    run_dir, half, log = folder / "run", folder / "half", folder / "log"
    checkpoints = run_dir / "checkpoints"

    def kill_at(step: int, saved: int | None = None) -> None:
        checkpoint = checkpoints / str(saved)
        with started(train(run_dir), text_cache, log) as process:
            there = lambda: saved is None or checkpoint.exists()  # noqa: E731
            wait_until(process, lambda: logged(run_dir) >= step and there(), log)
            kill_group(process)

    def kill_while_saving(step: int) -> bool:
        """Whether the kill came before the checkpoint was whole."""
        with started(train(run_dir), text_cache, log) as process:
            wait_until(process, lambda: bool(list(checkpoints.glob(f"{step}.*"))), log)
            kill_group(process)
        return not (checkpoints / str(step)).exists()

    kill_at(KILLS.randint(1, 5))  # before there is a checkpoint
    kill_at(KILLS.randint(13, 17), saved=12)
    shutil.copytree(run_dir, half)
    half_step = logged(half)
    assert any(kill_while_saving(step) for step in (18, 24))
    code, screen = on_terminal(train(run_dir), text_cache)
    assert code == 0, screen
    return Killed(run_dir=run_dir, half=half, half_step=half_step, screen=screen)
