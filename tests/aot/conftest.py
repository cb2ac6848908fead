"""What tests/conftest.py sets for speed is undone where real compilers are at work."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    """All optimisations, or memory is not what it will be; no cache of compiled programs, since
    one for chips that are not here can be written but not read."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()
