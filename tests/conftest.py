"""Eight emulated CPU devices in this process, and the strict settings all tests run under."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import processes
import pytest

# Compiled programs are kept between runs of the suite: a re-run takes a fraction of the first.
CACHE = Path(os.environ.get("JAXMOE_TEST_CACHE", Path(tempfile.gettempdir()) / "jaxmoe-test-cache"))

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# Halves a cold compile; what is tested are values, not speed.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program takes a hundred memory maps or more, of which Linux allows a process
    65,530 (vm.max_map_count); with more XLA dies of a segmentation fault. A worker that had run
    most of the suite got there."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def text_cache() -> Path:
    """One data cache for all tests and the runs they start."""
    folder = CACHE / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def straight(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tests/run/small.py on one device from start to end: what all others must equal."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    (run_dir.parent / "stdout").write_text(processes.finish(processes.train(run_dir), text_cache))
    return run_dir
