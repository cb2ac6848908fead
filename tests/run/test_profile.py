"""Traces of chosen steps: which steps are in them, and the model's names."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rehearsal import Rehearsed, rehearse

from jaxmoe.config_run import LogConfig
from jaxmoe.run.profile import Profile

# What stands between the names of scopes in the name of an operation.
BETWEEN = r"while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|branch_\d+_fun"


@pytest.fixture(scope="module")
def traced(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """Updates 3 and 4, and from 24 on: the run ends there."""
    log = LogConfig(profile_at=(3, 24), profile_steps=2)
    return rehearse(tmp_path_factory.mktemp("traced") / "run", text_cache, log=log)


def xplane(folder: Path) -> Path:
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    return file


def updates(file: Path) -> list[int]:
    """Numbers of the updates that a trace says it has."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            named = (dict(event.stats) for event in line.events if event.name == "update")
            found += [int(stats["step_num"]) for stats in named]
    return sorted(found)


def scopes(file: Path) -> set[tuple[str, str]]:
    """("forward" or "backward", names of scopes) of the step's operations in a trace."""
    found = set()
    for name in re.findall(rb"jit\(train_step\)/([\w()/]+)", file.read_bytes()):
        text = name.decode()
        way = "backward" if "transpose(" in text else "forward"
        parts = re.sub(r"transpose\(|jvp\(|\)", "", text).split("/")
        found.add((way, "/".join(p for p in parts[:-1] if not re.fullmatch(BETWEEN, p))))
    return found


def test_a_trace_has_the_steps_that_were_asked_for(traced: Rehearsed) -> None:
    assert traced.error is None
    profile = traced.folder / "profile"
    assert {f.name for f in profile.iterdir()} == {"step-3", "step-24"}
    assert updates(xplane(profile / "step-3")) == [3, 4]
    assert updates(xplane(profile / "step-24")) == [24]
    assert [(row["step"], row["why"]) for row in traced.events("profile")] == [
        (4, "a trace is in profile/step-3/"),
        (24, "a trace is in profile/step-24/"),
    ]


def test_names_in_a_trace_read_like_the_model(traced: Rehearsed) -> None:
    found = scopes(xplane(traced.folder / "profile" / "step-3"))
    for name in (
        *("embed", "final/norm"),
        *("layers/attention/norm", "layers/attention/qkv", "layers/attention/attend"),
        *("layers/attention/out", "layers/moe/norm", "layers/moe/router"),
        *("layers/moe/experts/matmuls", "layers/moe/experts/dispatch"),
    ):
        assert {("forward", name), ("backward", name)} <= found, name
    for name in ("loss/head", "layers/moe/experts/combine", "optimizer"):
        assert ("forward", name) in found, name


def test_a_traced_run_has_the_losses_of_any_other(
    traced: Rehearsed, text_cache: Path, tmp_path: Path
) -> None:
    assert rehearse(tmp_path / "run", text_cache).metrics == traced.metrics


def test_a_traced_program_has_its_own_names_though_another_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache leaves names out of what it looks programs up by."""

    def text(name: str) -> str:
        def named(x: Any) -> Any:
            with jax.named_scope(name):
                return jnp.sin(x) @ x

        return str(jax.jit(named).lower(jnp.ones((19, 19))).compile().as_text())

    before = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        assert "/before/" in text("before")
        with Profile(LogConfig(profile_at=(1,)), tmp_path, 9, writes=False).naming():
            assert "/after/" in text("after")
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert not jax.config.jax_compilation_cache_include_metadata_in_key  # pyright: ignore
