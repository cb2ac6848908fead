"""A finished run, and the same as transformers has it."""

from pathlib import Path

import pytest
from folders import quiet

from jaxmoe.convert import transfer


@pytest.fixture(scope="session")
def exported(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tests/run/small.py through to-hf."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    transfer.to_hf(straight, folder, None, quiet)
    return folder


@pytest.fixture(scope="session")
def returned(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And back through from-hf."""
    folder = tmp_path_factory.mktemp("returned") / "ours"
    transfer.from_hf(exported, folder, quiet)
    return folder
