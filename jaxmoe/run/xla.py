"""How XLA is asked to compile: options by backend, and where compiled programs are kept."""

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

# Options of the train step by backend; what the user names in XLA_FLAGS is the user's.
# None was timed by us yet on the chips that they are for: each has its reason instead.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Nothing that was tried on 2 CPU cores was faster than the defaults (LOG.md).
    "cpu": {},
    "gpu": {
        # Collectives run beside matmuls: without it they are scheduled where they stand.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # FSDP in a scan over layers: the next layer's weights are gathered, and the last one's
        # gradients scattered, across the iterations of the loop.
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
    },
    # libtpu hides latency and fuses collectives by default.
    "tpu": {},
}

# Compiled programs take 1 to 20 MB each; the oldest go first.
MAX_CACHE_BYTES = 4 << 30


def options(backend: str | None = None) -> dict[str, Any]:
    """Compiler options of a backend (of the one in use), without those that XLA_FLAGS sets."""
    own = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    backend = backend or jax.default_backend()
    backend = {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend)
    return {name: value for name, value in OPTIONS.get(backend, {}).items() if name not in own}


def keep_compiled(root: Path) -> Path | None:
    """Turns JAX's persistent compilation cache on, below `root`; where the user has set one, or
    has turned it off, nothing changes.

    Returns:
        The folder, or None where there is none that can be written.
    """
    known: Any = jax.config  # its fields are made at run time
    if known.jax_compilation_cache_dir or not known.jax_enable_compilation_cache:
        return None
    folder = root / f"xla-{_machine()}"
    try:
        # Whoever may write here can run code in our processes (JAX's documentation).
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)
    # Below this, reading takes as long as compiling.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


def compile_with_options(lowered: Any, backend: str | None = None) -> tuple[Any, list[str]]:
    """The compiled program, and which of the options this version of XLA does not know."""
    wanted, left_out = options(backend), []
    while True:
        try:
            return lowered.compile(compiler_options=wanted), left_out
        except jax.errors.JaxRuntimeError as error:
            unknown = [name for name in wanted if f"No such compile option: '{name}'" in str(error)]
            if not unknown:
                raise
            left_out += unknown
            wanted = {name: value for name, value in wanted.items() if name not in unknown}


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """The programs that were read from the persistent cache instead of compiled, while it lasts."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _machine() -> str:
    """A home directory may be shared by machines of different instruction sets, and programs for
    CPU run on their own only."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = next(
            line for line in text.splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        features = platform.processor()
    words = f"{platform.machine()} {' '.join(sorted(features.split()))}"
    return hashlib.sha256(words.encode()).hexdigest()[:8]
