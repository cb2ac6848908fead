"""The data of a run: a folder of text, tokenised into the cache, or a data set that was built."""

from pathlib import Path

from jaxmoe.config import Config
from jaxmoe.data.build import Report
from jaxmoe.data.cache import cache_root, prepare
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.damage import open_guarded
from jaxmoe.data.dataset import MANIFEST
from jaxmoe.data.heldout_sets import corpus_of
from jaxmoe.data.remote import is_url, open_remote
from jaxmoe.data.verify import verify as verify_files
from jaxmoe.errors import UserError
from jaxmoe.outside import loads

__all__ = ["is_data_set", "open_corpus"]


def open_corpus(config: Config, report: Report | None = None, *, verify: bool = False) -> Corpus:
    """What config.data names. A folder with the manifest of a data set is one; others are text. A
    URL is of a data set.

    Raises:
        UserError: it cannot be used; the message names the mend.
    """
    path = config.data.path
    remote = path is not None and is_url(path)
    if path is None or not (remote or is_data_set(Path(path).expanduser())):
        return prepare(config.data, config.model.vocab_size, report, verify=verify)
    if verify:  # every file now, instead of each shard when it is first read
        _verify(path, report)
    if remote:
        data, guard = open_remote(path, cache_root(config.data), config.data.damaged)
    else:
        data, guard = open_guarded(path, config.data.damaged)
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer of {path} has"
            f" {data.tokenizer.vocab_size} ids; set it to so many or more"
        )
    return corpus_of(data, guard, remote=remote)


def _verify(path: str, report: Report | None) -> None:
    told = report or (lambda phase, done: None)
    for verdict in verify_files(path, told):
        if verdict.fault is not None:
            raise UserError(f"{path}: {verdict.file} {verdict.fault}; copy it there whole again")


def is_data_set(folder: Path) -> bool:
    """Whether its manifest is of one, whatever the format: `open_data_set` says if it is old."""
    try:
        manifest = loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()
