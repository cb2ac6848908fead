import random
from pathlib import Path

import pytest

from jaxmoe.config import DataConfig

_SYLLABLES = "ka lo mi ren tu sel or vin da pre shu ex ton ba ir que mon fal".split()


def _prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices(_SYLLABLES, k=3)) for _ in range(200)]
    lines = (" ".join(rng.choices(lexicon, k=9)) for _ in range(words // 9 + 1))
    return "".join(f"{line}.\n" for line in lines)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """24 packages of 3 documents; `mark7x` stands in every document of package p7 alone."""
    root = tmp_path / "texts"
    for package in range(24):
        (root / f"p{package}").mkdir(parents=True)
        for number in range(3):
            text = f"mark{package}x " + _prose(100 * package + number, 150)
            (root / f"p{package}" / f"{number}.txt").write_text(text)
    return root


@pytest.fixture
def config(texts: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(texts), tokenizer="bytes", cache=str(tmp_path / "cache"))
