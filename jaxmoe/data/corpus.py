"""What a run is trained and evaluated on: sources of tokens, and held-out sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.data.damage import Guard
from jaxmoe.data.dataset import Names
from jaxmoe.data.store import Row, Source
from jaxmoe.data.tokenizer import Tokenizer

__all__ = ["TRAIN", "Corpus", "HeldOut", "Texts"]

TRAIN = "train"  # the one source of a prepared text folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Documents of one domain."""

    tokens: np.ndarray  # [tokens]: eot, then every document followed by eot
    ends: np.ndarray  # [documents] int64: where in `tokens` each ends, its eot included
    sizes: np.ndarray  # [documents] int64: bytes of UTF-8 text


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    name: str
    tokens: np.ndarray  # [tokens]: eot, then every document followed by eot
    bytes: int  # of UTF-8 text
    # Of the text: the same under every tokenizer. A part of a set has more after a slash.
    fingerprint: str
    xz_bits_per_byte: float  # of exactly these bytes, preset 9; of a part: of the whole
    domains: Mapping[str, Texts]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """An opened data set. Losses are only comparable between runs with the same `fingerprint`."""

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    heldout: HeldOut
    fingerprint: str  # 16 hex digits: of the tokenizer and of every training source
    sources: Mapping[str, Source]
    names: Mapping[str, Names]  # of the documents, by source
    others: tuple[HeldOut, ...] = ()  # further held-out sets
    guard: Guard | None = None  # of shards that are compared as they are read
    remote: bool = False  # shards are read over a network

    @property
    def plain(self) -> bool:
        """Whether it was prepared from a folder of text, whose order is that of loader.py."""
        return bool(self.manifest.get("settings", {}).get("plain"))

    @property
    def train(self) -> Row:
        """The tokens of a prepared text folder: eot, then every document followed by eot."""
        return Row(self.sources[TRAIN])
