"""A mirror of runs in this process: what is copied, brought, and what a store says meanwhile."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rehearsal import Rehearsed, configured

from jaxmoe import stores
from jaxmoe.config import CheckpointConfig, FaultConfig
from jaxmoe.forecast import register
from jaxmoe.run import copies, mirror
from jaxmoe.run.bring import bring
from jaxmoe.run.loop import Trainer

ITEMS = ("state", "meta")
BREAK = FaultConfig(kind="nan-gradient", step=20)  # ends the run without a save


def to(tmp_path: Path, **own: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"every": 6, "mirror": (tmp_path / "mirror").as_uri(), **own})


def whole(tmp_path: Path) -> list[int]:
    return sorted(int(f.stem) for f in (tmp_path / "mirror" / "whole").glob("*.json"))


def files(tmp_path: Path, step: int) -> Path:
    return tmp_path / "mirror" / "checkpoints" / str(step) / "files"


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def slowly(patch: pytest.MonkeyPatch) -> None:
    """Training waits at each save until its copy is there or has failed, so that what is there at a
    break is known; and tries come soon after one another."""
    save = Trainer.save

    def saved(self: Trainer, step: int, state: Any, *, near: bool = False) -> None:
        save(self, step, state, near=near)
        self.settle_saves(step)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.config.checkpoint.mirror is not None:
            told = [e["step"] for e in self.record.read("events.jsonl") if "mirror" in e["what"]]
            if step in told:
                return
            time.sleep(0.005)

    patch.setattr(Trainer, "save", saved)
    soon(patch)


def soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mirror, "TICK", 0.01)
    patch.setattr(mirror, "WAIT", 0.01)
    patch.setattr(copies, "FIRST_WAIT", 0.001)
    patch.setattr(copies, "JITTER", 0.001)


def copied(
    folder: Path, text_cache: Path, tmp_path: Path, own: dict[str, Any] | None = None, **parts: Any
) -> list[tuple[str, int, str]]:
    """The events of copying what is there."""
    told = []
    config = configured(text_cache, checkpoint=to(tmp_path, **(own or {})), **parts)
    tell = lambda *event: told.append(event)  # noqa: E731
    with mirror.Mirror(config, folder, tell, writes=True) as one:
        one.end_in_order()
    return told


def brought(
    folder: Path, text_cache: Path, tmp_path: Path, resume: str = "auto", **parts: Any
) -> None:
    own = {"checkpoint": to(tmp_path), **parts}
    bring(configured(text_cache, **own), folder, resume, lambda line: None)


class Wrapped:
    """A store of which each request is told beforehand, which may raise."""

    def __init__(self, store: Any, tell: Callable[[str, str, Any], None]) -> None:
        self._store, self._tell = store, tell

    def write(self, key: str, value: bytes | None) -> Any:
        self._tell("write", key, value)
        return self._store.write(key, value)

    def read(self, key: str) -> Any:
        self._tell("read", key, None)
        return self._store.read(key)

    def __getattr__(self, name: str) -> Any:
        self._tell(name, "", None)
        return getattr(self._store, name)


def wrap(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str, str, Any], None]) -> None:
    opened = stores.opened
    monkeypatch.setattr(stores, "opened", lambda *args: Wrapped(opened(*args), tell))


def same_run(one: Rehearsed, other: Rehearsed) -> None:
    """Bit for bit, and the register too but for when its lines were written."""
    assert one.error is None and one.metrics == other.metrics and one.evals == other.evals
    kept = [register.read(r.folder / "forecasts.jsonl") for r in (one, other)]
    own = ("time", "previous", "config", "code")
    assert [{k: v for k, v in line.items() if k not in own} for line in kept[0]] == [
        {k: v for k, v in line.items() if k not in own} for line in kept[1]
    ]
    assert register.verify(one.folder / "forecasts.jsonl") == []
