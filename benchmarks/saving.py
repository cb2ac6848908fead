"""What a checkpoint costs: how long a step waits for it, and how much host memory it takes.

    python benchmarks/saving.py                    the quickstart's model, saved every 20 steps
    python benchmarks/saving.py --every 10 --saves 5 --set model.n_experts=128 --json

The stall is the time that the loop spends in a save (the copy, and what is left of the one before),
of a step's time and of the default interval's. Memory is the peak of the process from the first
save to the last but one (an evaluation compiles before the last) over its peak in the steps before,
which compile nothing, over the bytes of the state. Steps go on while files are written, so they are
slower then, on a machine whose cores they share: that is told as well.
"""

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import CheckpointConfig, Config, EvalConfig, ForecastConfig, replace
from jaxmoe.data.opened import open_corpus
from jaxmoe.run import platform
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.state import TrainState

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
DEFAULT_EVERY = CheckpointConfig().every
TICK = 0.005  # seconds between looks at the memory


class Timed(Trainer):
    """A run that notes when steps are taken, and how long saves take."""

    def __init__(self, *args: Any, peak: "Peak") -> None:
        super().__init__(*args)
        self.begun: list[float] = []
        self.stalls: list[float] = []
        self.peak, self.peaks = peak, list[int]()  # bytes as each save begins

    def take(self, state: TrainState, batch: Any) -> Any:
        if len(self.begun) == 1:
            self.peak.bytes = 0  # the first step has compiled
        self.begun.append(time.perf_counter())
        return super().take(state, batch)

    def save(self, step: int, state: TrainState, *, near: bool = False) -> None:
        jax.block_until_ready(state)  # that the step ends is no stall
        self.peaks.append(self.peak.bytes)
        begin = time.perf_counter()
        super().save(step, state, near=near)
        self.stalls.append(time.perf_counter() - begin)


class Peak:
    """The most memory that the process has had, looked at all the time."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(TICK):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(every: int, saves: int, sets: Sequence[str] = ()) -> dict[str, float]:
    config = config_lib.apply_sets(config_lib.load(str(QUICKSTART)), sets)
    steps = every * saves
    config: Config = replace(
        config,
        train=replace(config.train, steps=steps, log_every=steps),
        eval=EvalConfig(every=steps, batch_size=config.eval.batch_size),
        forecast=ForecastConfig(first=steps, every=steps),
        checkpoint=CheckpointConfig(every=every),
    )
    platform.start(config)
    mesh = mesh_lib.build(config.mesh)
    corpus = open_corpus(config, lambda *_: None)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        with Peak() as peak:
            run = Timed(config, mesh, corpus, Path(folder) / "run", Silent(), math.inf, peak=peak)
            state = run.prepare()
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            run.run(state)
    gaps = [b - a for a, b in zip(run.begun, run.begun[1:], strict=False)]
    at = {n for n in range(1, len(gaps) + 1) if n % every == 0}  # a save lies in these gaps
    plain = [gap for n, gap in enumerate(gaps, 1) if n not in at and n > every // 2]
    step = statistics.median(plain)
    stall = statistics.median(run.stalls[1:])
    return {
        "state_bytes": size,
        "step_seconds": step,
        "stall_seconds": stall,
        "stall_of_default_interval": stall / (DEFAULT_EVERY * step),
        "slowest_step_while_written": max(plain) / step,
        "memory_over_state": (run.peaks[-2] - run.peaks[0]) / size,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=20, metavar="N", help="steps between saves")
    parser.add_argument("--saves", type=int, default=6, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = measure(args.every, args.saves, args.set)
    if args.json:
        print(json.dumps(found))
        return
    out = Console(highlight=False)
    out.print(f"state {found['state_bytes'] / 1e6:.1f} MB, a step {found['step_seconds']:.3f} s")
    out.print(
        f"a save stalls {found['stall_seconds']:.3f} s:"
        f" {found['stall_of_default_interval']:.2%} of the time of {DEFAULT_EVERY} steps"
    )
    out.print(f"slowest step while files are written: {found['slowest_step_while_written']:.2f} x")
    out.print(f"memory beyond that of training: {found['memory_over_state']:.2f} of the state")


if __name__ == "__main__":
    main()
