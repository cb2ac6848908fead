"""Tokenizers by name or file: ours, and those of the libraries of the field."""

import base64
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxmoe.data import ranks
from jaxmoe.data.tokenizer import SPECIALS, Tokenizer, bytes_tokenizer, learn
from jaxmoe.errors import UserError
from jaxmoe.outside import loads, needed, reading

__all__ = ["DEFAULT", "load_tokenizer", "save_tokenizer", "train_tokenizer"]

DEFAULT = Path(__file__).parent / "tokenizers" / "default-32k.tiktoken"
ROLES = tuple(SPECIALS)  # eot, pad, fim_prefix, fim_middle, fim_suffix
PATTERN = "jaxmoe-2"
_LONGEST = 128  # bytes of a token; without it a file of one letter gives tokens of 8,192


def load_tokenizer(name: str) -> Tokenizer:
    """`default`, `bytes`, or a file: tokenizer.json, *.tiktoken, or a sentencepiece *.model.

    A rank file says neither how text is split nor what is special; FILE.tiktoken.json beside it
    does: {"pattern": a name of `ranks.PATTERNS` or the pattern, "specials": {"<|eot|>": id}}.

    Raises:
        UserError: no such file, or not a tokenizer; with the file and the mend.
    """
    if name == "bytes":
        return bytes_tokenizer()
    if name == "default":
        return _default()
    path = Path(name).expanduser()
    if path.is_dir():  # a downloaded model, or a data set
        path = next((path / n for n in _IN_FOLDERS if (path / n).is_file()), path)
    if not path.is_file():
        raise UserError(f"tokenizer {name}: no such file; give a file, default or bytes")
    if path.suffix == ".tiktoken":
        return _from_ranks(path)
    if path.suffix == ".model":
        with reading(path):
            model = base64.b64encode(path.read_bytes()).decode()
        return _named(json.dumps({"kind": "sentencepiece", "model": model}), path)
    return _from_json(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` ids: 256 bytes, the merges, and last the five specials.

    Raises:
        UserError: too few repeated pairs in the texts, or `vocab_size` is too small.
    """
    least = 256 + len(ROLES)
    if vocab_size < least:
        raise UserError(f"--vocab-size {vocab_size}: bytes and special tokens need {least}")
    bpe = learn(texts, vocab_size - len(ROLES), ranks.PATTERNS[PATTERN], [], _LONGEST)
    tree = loads(bpe.to_str())
    learnt = ranks.to_ranks(tree)
    assert learnt is not None, "the trainer's merges are in the order of its ids"
    if len(learnt) < vocab_size - len(ROLES):
        most = len(learnt) + len(ROLES)
        raise UserError(f"--vocab-size {vocab_size}: the text only gives {most}; ask for that")
    return Tokenizer(ranks.to_json(learnt, ranks.PATTERNS[PATTERN], _specials(len(learnt))))


def save_tokenizer(tokenizer: Tokenizer, path: Path, recipe: dict[str, Any]) -> None:
    """Writes FILE.tiktoken with FILE.tiktoken.json, or (any other suffix) a tokenizer.json.

    Raises:
        UserError: ranks are asked for, and the tokenizer is no byte-level BPE.
    """
    if path.suffix != ".tiktoken":
        path.write_text(tokenizer.json)
        return
    tree = loads(tokenizer.json)
    learnt = ranks.to_ranks(tree) if ranks.byte_level(tree) else None
    if learnt is None:
        raise UserError(f"{path}: a {tokenizer.kind} tokenizer has no ranks; name it *.json")
    specials = {t["content"]: t["id"] for t in tree["added_tokens"]}
    beside = {"pattern": PATTERN, "specials": specials, "fingerprint": tokenizer.fingerprint}
    path.write_bytes(ranks.write(learnt))
    text = json.dumps({**beside, "recipe": recipe}, indent=1) + "\n"
    _beside(path).write_text(text)


_IN_FOLDERS = ("tokenizer.json", "tokenizer.model")


@functools.cache
def _default_json() -> str:
    return _from_ranks(DEFAULT).json


def _default() -> Tokenizer:
    return Tokenizer(_default_json())  # a new one: `threads` may be set on it


def _from_ranks(path: Path) -> Tokenizer:
    beside = _beside(path)
    mend = f'write it: {{"pattern": "gpt4", "specials": {{"{SPECIALS["eot"][1]}": 100257}}}}'
    try:
        about = loads(beside.read_text())
        pattern, specials = str(about["pattern"]), dict(about["specials"])
    except FileNotFoundError:
        raise UserError(f"{path} needs {beside.name}, how text is split; {mend}") from None
        needed(specials, dict.fromkeys(specials, int), beside)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside}: {error!r}; {mend}") from None
    with reading(path):
        found = ranks.parse(path.read_bytes(), str(path))
        text = ranks.to_json(found, ranks.PATTERNS.get(pattern, pattern), specials, str(path))
    tokenizer = _named(text, path)
    expected = about.get("fingerprint", tokenizer.fingerprint)
    if tokenizer.fingerprint != expected:
        raise UserError(f"{path} has changed: {beside.name} has fingerprint {expected}")
    return tokenizer


def _beside(path: Path) -> Path:
    """What says the pattern and the specials of a rank file."""
    return path.with_name(path.name + ".json")


def _from_json(path: Path) -> Tokenizer:
    with reading(path, "give a tokenizer.json, a *.tiktoken or a sentencepiece *.model"):
        return _named(path.read_text(), path)


def _named(text: str, path: Path) -> Tokenizer:
    """Raises UserError with the file."""
    try:
        return Tokenizer(text)
    except UserError as error:
        mend = "give a tokenizer.json, a *.tiktoken or a sentencepiece *.model"
        raise UserError(f"{path}: {error}; {mend}") from None


def _specials(first: int) -> dict[str, int]:
    return {names[0]: first + i for i, names in enumerate(SPECIALS.values())}
