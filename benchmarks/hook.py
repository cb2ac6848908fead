"""python benchmarks/hook.py: what the forecast costs a run, as shares of its steps.

The quickstart, shorter, with a forecast every 100 steps. Two costs are measured: seconds that the
loop waits for the forecast (its own part of each eval and save, and for the worker to end), and
processor seconds of the forecast on either thread. Shares are of the steps' wall time and of the
process's processor time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import replace
from jaxmoe.data.opened import open_corpus
from jaxmoe.run.forecasting import ForecastHook
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
from jaxmoe.run.watching import Watching

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
WAITS = ("after_eval", "settle", "head", "standing")  # what the loop calls


class Clock:
    """Wall and processor seconds of the forecast's calls, by thread."""

    def __init__(self) -> None:
        self.waited = self.loop_cpu = self.worker_cpu = self.watching = 0.0
        self.fits: list[float] = []
        self._inside = False

    def waits(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Counts a call of the loop once, also where one calls another."""

        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return call(*args, **options)
            self._inside = True
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self._inside = False
                self.waited += time.perf_counter() - began
                self.loop_cpu += time.thread_time() - cpu

        return timed

    def works(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.fits.append(time.perf_counter() - began)
                self.worker_cpu += time.thread_time() - cpu

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    args = parser.parse_args()
    clock = Clock()
    for name in WAITS:
        setattr(ForecastHook, name, clock.waits(getattr(ForecastHook, name)))
    Watching.after_eval = clock.waits(Watching.after_eval)
    ForecastHook._forecast = clock.works(ForecastHook._forecast)
    config = config_lib.load(str(QUICKSTART))
    config = replace(
        config,
        train=replace(config.train, steps=args.steps),
        forecast=replace(config.forecast, first=100, every=100),
    )
    mesh = mesh_lib.build(config.mesh)
    corpus = open_corpus(config)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        trainer = Trainer(config, mesh, corpus, Path(folder) / "run", Silent(), 1e12)
        state = trainer.prepare()
        cpu = time.process_time()
        trainer.run(state)
        cpu = time.process_time() - cpu
        rows = trainer.record.read("metrics.jsonl")
    seconds = [s for row in rows if (s := row["perf/step_seconds"]) is not None]
    steps = args.steps * sorted(seconds)[len(seconds) // 2]
    spent = clock.loop_cpu + clock.worker_cpu
    print(
        json.dumps(
            {
                "forecasts": len(clock.fits),
                "seconds of a step, median": round(steps / args.steps, 4),
                "seconds of a forecast": [round(s, 3) for s in clock.fits],
                "the loop waits, s": round(clock.waited, 3),
                "share of the steps": f"{clock.waited / steps:.3%}",
                "processor seconds": round(spent, 3),
                "share of the process's": f"{spent / cpu:.3%}",
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
