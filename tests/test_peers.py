"""benchmarks/peers.py: what its table says of the times that workers answer with."""

import argparse
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # as `python benchmarks/peers.py` has it
    try:
        yield importlib.import_module("peers")
    finally:
        sys.path.remove(str(FOLDER))


def made(peers: ModuleType, name: str, walls: list[list[float]]) -> Any:
    """A worker with these steps behind it; half a wall second of system time to each."""
    worker = peers.Worker(peers.Peer(name, "", "", ("a way",)), "a way", None, Path())
    worker.turns = [[{"wall": w, "user": w, "system": w / 2} for w in turn] for turn in walls]
    worker.facts = {"params": 7, "version": "1"}
    return worker


def test_ratios_are_of_the_same_turn(peers: ModuleType) -> None:
    """The machine is half as fast in the second turn, and no ratio shows it."""
    config = peers.step.shapes()["moe8"]
    ours = made(peers, "jaxmoe", [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]])
    other = made(peers, "other", [[3.0, 3.0, 3.0], [6.0, 6.0, 60.0]])
    rows = peers.with_ratios([peers.row(w, config, {}) for w in (ours, other)])
    assert rows[0]["wall_ratio"] == rows[0]["cpu_ratio"] == (1, 1, 1)
    assert rows[1]["wall_ratio"] == rows[1]["cpu_ratio"] == (3, 3, 3)
    assert rows[1]["wall_seconds"] == 4.5
    assert rows[1]["cpu_seconds"] == 1.5 * 4.5
    assert rows[1]["tokens_per_second"] == pytest.approx(8 * 256 / 4.5)


def test_the_table_warns_of_unequal_shapes(peers: ModuleType) -> None:
    config = peers.step.shapes()["moe8"]
    rows = peers.with_ratios(
        [peers.row(made(peers, name, [[1.0]]), config, {}) for name in ("jaxmoe", "transformers")]
    )
    result = {"rows": rows, "threads": 2, "load_average": (0.1, 0, 0), "batched_mm_gib": 24.0}
    assert "DIFFER" not in peers.table(result, config)
    rows[1]["params"] += 1
    assert "DIFFER" in peers.table(result, config)


def test_a_missing_library_is_one_line(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = argparse.Namespace(no_transformers=False, maxtext=None, compile=False, ways=())
    with pytest.raises(SystemExit, match=r"torch and transformers .*\.\[parity\]"):
        peers.peers(args)


def test_a_worker_runs_what_it_is_asked_and_ends_with_its_asker(tmp_path: Path) -> None:
    """The protocol, with a library that only sleeps and prints."""
    np.save(tmp_path / "batches.npy", np.arange(3 * 2 * 4, dtype=np.int32).reshape(3, 2, 4))
    code = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
from peers_worker import Meter
meter = Meter({{"batches": {str(tmp_path / "batches.npy")!r}}})
while True:
    first = int(meter.begin()[0, 0])
    print("noise of a library")
    time.sleep(0.02)
    meter.end()
    meter.facts = {{"first": first}}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input="2\n3\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in io.StringIO(done.stdout)]
    assert [len(a["steps"]) for a in answers] == [0, 2, 3]
    assert [a.get("first") for a in answers] == [None, 8, 8]  # batches 0 1 | 2 0 1
    assert all(s["wall"] >= 0.02 and s["user"] >= 0 for a in answers for s in a["steps"])
    assert "noise" in done.stderr
