"""Deadlines: a run that no longer moves says where every thread stands, and ends.

A process that waits for others in a collective cannot be interrupted from within Python, nor end by
an exception: the thread here writes what it knows and ends the process at once.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxmoe import exits

__all__ = ["Watchdog"]

TICK = 0.2  # seconds between looks at the clock
LINGER = 10.0  # seconds at most, so that peers whose deadline comes next can write theirs
LAST = 30.0  # seconds, after which it ends even if it cannot write


class Watchdog:
    """One expectation at a time: each replaces the one before."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """`folder`: where stacks go; `tell`: of what expired, before the process ends."""
        self._folder, self._tell = folder, tell
        self._expected: tuple[str, float, float] | None = None  # what, seconds, until when
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def expect(self, what: str, seconds: float) -> None:
        """`what` ends within so many seconds; 0: it may take as long as it likes."""
        self._expected = (what, seconds, time.monotonic() + seconds) if seconds else None

    def close(self) -> None:
        """For good."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            expected = self._expected
            if expected is not None and time.monotonic() > expected[2]:
                self._expire(*expected[:2])

    def _expire(self, what: str, seconds: float) -> None:
        last = threading.Timer(LAST, os._exit, (exits.HUNG,))
        last.daemon = True
        last.start()
        file = self._folder / f"stacks-rank-{jax.process_index()}.txt"
        why = f"{what} took more than {seconds:g} s"
        try:
            with open(file, "w") as out:
                out.write(f"{why}\n\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            why = f"{why}; where every thread stands: {file.name}"
            self._tell(why)
            print(f"jaxmoe.train: {why}", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                time.sleep(min(LINGER, seconds))
        finally:
            os._exit(exits.HUNG)
