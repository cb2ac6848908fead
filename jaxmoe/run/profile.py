"""Traces of chosen steps by jax.profiler, in the run directory (docs/watching.md)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax

from jaxmoe.config_run import LogConfig

FOLDER = "profile"  # of the run directory; one folder a trace in it: step-N, of its first update


class Profile:
    """Of the first process: all do the same, and one trace shows it."""

    def __init__(self, log: LogConfig, run_dir: Path, last: int, *, writes: bool) -> None:
        """`last`: step of the run."""
        self._run_dir, self._log, self._last = run_dir, log, last
        self._at = log.profile_at if writes else ()
        self._running: tuple[int, Path] | None = None  # the last step, and where it goes

    def begins(self, step: int) -> bool:
        """Whether the next update is one to begin at."""
        return step + 1 in self._at and self._running is None

    def begin(self, step: int) -> None:
        """The device must be idle."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the loop's own calls would be most of the file
        folder = Path(FOLDER) / f"step-{step + 1}"
        jax.profiler.start_trace(self._run_dir / folder, profiler_options=options)
        self._running = min(step + self._log.profile_steps, self._last), folder

    def ends(self, step: int) -> bool:
        return self._running is not None and step == self._running[0]

    def end(self) -> Path | None:
        """The folder in the run directory of the trace that ran, if one did."""
        if self._running is None:
            return None
        folder, self._running = self._running[1], None
        jax.profiler.stop_trace()
        return folder

    @contextmanager
    def ending(self) -> Iterator[None]:
        """No trace goes on beyond this."""
        try:
            yield
        finally:
            self.end()

    def step(self, number: int) -> Any:
        """What a trace shows as one update."""
        if self._running is None:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=number)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """A program that is compiled in here has the names of this very code, where a trace is to
        show them: the cache takes programs for equal that differ in names alone."""
        known: Any = jax.config
        before = known.jax_compilation_cache_include_metadata_in_key
        names = before or bool(self._log.profile_at)
        jax.config.update("jax_compilation_cache_include_metadata_in_key", names)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_include_metadata_in_key", before)
