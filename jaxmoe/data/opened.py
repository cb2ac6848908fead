"""The data of a run: a folder of text, tokenised into the cache, or a data set that was built."""

import json
from pathlib import Path

import numpy as np

from jaxmoe.config import Config
from jaxmoe.data.build import MANIFEST, Report
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.errors import UserError

__all__ = ["is_data_set", "open_corpus"]


def open_corpus(config: Config, report: Report | None = None, *, verify: bool = False) -> Corpus:
    """What config.data names. A folder with the manifest of a data set is one; others are text.

    Raises:
        UserError: it cannot be used; the message names the mend.
    """
    if config.data.path is None or not is_data_set(Path(config.data.path).expanduser()):
        return prepare(config.data, config.model.vocab_size, report, verify=verify)
    from jaxmoe.data.damage import open_guarded
    from jaxmoe.data.dataset import open_data_set
    from jaxmoe.data.heldout_sets import held_out_sets

    if verify:  # every file now, instead of each shard when it is first read
        open_data_set(config.data.path, verify=True)
    data, guard = open_guarded(config.data.path, config.data.damaged)
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer of {config.data.path} has"
            f" {data.tokenizer.vocab_size} ids; set it to so many or more"
        )
    first, *rest = held_out_sets(data)
    return Corpus(
        folder=data.folder,
        manifest=data.manifest,
        tokenizer=data.tokenizer,
        train=np.empty(0, data.tokenizer.dtype),
        heldout=first,
        others=tuple(rest),
        fingerprint=data.fingerprint,
        guard=guard,
        sources=data.sources,
        names=data.names,
    )


def is_data_set(folder: Path) -> bool:
    """Whether `python -m jaxmoe.data build --out` made it: its manifest names sources."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format" in manifest and "sources" in manifest
