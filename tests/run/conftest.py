"""Runs that serve several tests: one that is killed again and again, one that is broken off."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, Mesh
from mirrored import BREAK, slowly, soon, to, whole
from processes import Killed, kill_group, logged, on_terminal, started, train, wait_until
from rehearsal import Rehearsed, rehearse

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


@pytest.fixture(scope="session")
def plain(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """The run without a mirror and without a break."""
    return rehearse(tmp_path_factory.mktemp("plain") / "run", text_cache)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)


@pytest.fixture(scope="session")
def broken_off(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 20, and its mirror."""
    folder = tmp_path_factory.mktemp("broken-off")
    with pytest.MonkeyPatch.context() as patch:
        slowly(patch)
        ran = rehearse(folder / "run", text_cache, BREAK, checkpoint=to(folder))
    assert isinstance(ran.error, FloatingPointError)
    assert whole(folder) == [12, 18] and not ran.events("mirror-failed")
    return folder


@pytest.fixture
def lost(broken_off: Path, tmp_path: Path) -> Path:
    """The run directory of before, which is not there; its mirror is."""
    shutil.copytree(broken_off / "mirror", tmp_path / "mirror")
    return tmp_path / "run"


@pytest.fixture
def there(plain: Rehearsed, tmp_path: Path) -> Path:
    """The directory of a whole run that has no mirror yet."""
    return Path(shutil.copytree(plain.folder, tmp_path / "run"))
