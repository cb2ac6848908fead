"""Seconds from launching `python -m jaxmoe.train` to its first trained step (peers.py --launch)."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe import config as config_lib
from jaxmoe.data.cache import prepare
from jaxmoe.run import record
from jaxmoe.train import QUICKSTART

ROOT = Path(__file__).resolve().parents[1]
RUNS = 2  # of each kind
PATIENCE = 300.0  # seconds to a first step
POLL = 0.02


def launch(say: Callable[[str], None], *, as_json: bool) -> None:
    """The quickstart, its data prepared before, with an empty and a filled compilation cache."""
    config = config_lib.load(str(QUICKSTART))
    say("preparing the quickstart's data")
    prepare(config.data, config.model.vocab_size, lambda *_: None)
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for run in range(RUNS):
        with tempfile.TemporaryDirectory(prefix="peers-launch-") as name:
            folder = Path(name)
            for kind in found:  # the cold run fills the cache for the warm one
                say(f"launch {run + 1} of {RUNS}, {kind} compilation cache")
                found[kind].append(first_step(folder / f"run-{kind}", folder / "xla"))
    if as_json:
        print(json.dumps({"launch": found, "load_average": os.getloadavg()}))
        return
    print(f"launch to first step of the quickstart; load of the machine {os.getloadavg()[0]:.1f}")
    print("cache   to first step s   of it compiling s   first step s   CPU s")
    for kind, runs in found.items():
        for one in runs:
            print(
                f"{kind:6} {one['seconds']:16.1f} {one['compile_seconds']:19.1f}"
                f" {one['first_step_seconds']:14.2f} {one['cpu_seconds']:7.1f}"
            )


def first_step(run_dir: Path, cache: Path) -> dict[str, Any]:
    """Starts a run, waits until its record has the first step's time, and ends it.

    Raises SystemExit if the run ends before.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    file, log = run_dir / record.ENVIRONMENT, run_dir.with_suffix(".log")
    before = os.times()
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxmoe.train", "--run-dir", str(run_dir)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,  # `-m` takes the jaxmoe beside this file
        )
    try:
        while "first_step_seconds" not in (told := read(file)):
            if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                raise SystemExit(f"peers.py: jaxmoe.train came to no first step: {last[0]}")
            time.sleep(POLL)
        seconds = time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
    after = os.times()
    used = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    return {
        "seconds": seconds,
        "compile_seconds": told["compile_seconds"],
        "first_step_seconds": told["first_step_seconds"],
        "cpu_seconds": used,
    }


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there yet
        return {}
