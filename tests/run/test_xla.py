"""Compiled programs are kept for users, and each backend has its options."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest
from processes import environment, train

from jaxmoe.run import xla

CONFIG: Any = jax.config  # its fields are made at run time


@pytest.fixture
def no_cache() -> Any:
    """As for a user who has set nothing."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    before = CONFIG.jax_compilation_cache_dir
    assert before and xla.keep_compiled(tmp_path) is None
    assert CONFIG.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())


def test_the_cache_is_of_this_machine_and_for_its_owner(tmp_path: Path, no_cache: Any) -> None:
    folder = xla.keep_compiled(tmp_path / "new")
    assert folder is not None and CONFIG.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0
    assert xla._machine() in folder.name


def test_a_place_that_cannot_be_written_is_left_alone(tmp_path: Path, no_cache: Any) -> None:
    (tmp_path / "file").write_text("")
    assert xla.keep_compiled(tmp_path / "file") is None
    assert CONFIG.jax_compilation_cache_dir is None


def test_options_are_of_the_backend_and_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    name = "xla_gpu_enable_latency_hiding_scheduler"
    assert xla.options()[name] is True
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false --xla_dump_to=/nowhere")
    assert xla.options() == {k: v for k, v in xla.OPTIONS["gpu"].items() if k != name}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert xla.options() == xla.OPTIONS["cpu"]


def test_an_option_that_this_xla_does_not_know_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"xla_cpu_enable_fast_math": True}
    monkeypatch.setitem(vars(xla), "OPTIONS", {"cpu": {**known, "xla_no_such": 1, "xla_nor": 2}})
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    compiled, left_out = xla.compile_with_options(lowered)
    assert compiled(1.0) == 2 and sorted(left_out) == ["xla_no_such", "xla_nor"]
    monkeypatch.setitem(vars(xla), "OPTIONS", {"cpu": {"xla_cpu_enable_fast_math": "a word"}})
    with pytest.raises(jax.errors.JaxRuntimeError):
        xla.compile_with_options(lowered)


def test_the_second_run_reads_what_the_first_has_compiled(text_cache: Path, tmp_path: Path) -> None:
    own = {k: v for k, v in environment(text_cache).items() if k != "JAX_COMPILATION_CACHE_DIR"}
    own |= {"JAXMOE_CACHE": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir()
    for folder in text_cache.iterdir():  # the prepared text, so that only compiling is new
        os.symlink(folder, tmp_path / "cache" / folder.name)
    said = []
    for name in ("first", "second"):
        command = train(tmp_path / name, "--set", "train.steps=6", "--set", "model.d_model=20")
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        said.append("in the compilation cache" in done.stdout)
    assert said == [False, True]
    assert list(tmp_path.glob("cache/xla-*/*"))
