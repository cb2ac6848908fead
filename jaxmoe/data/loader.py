"""Token sequences by position. The order is a pure function of (seed, position).

A run's data position is one integer, the number of sequences consumed so far, and any number of
hosts reads just its own rows of a batch: nothing else has to be saved or agreed on.
"""

import hashlib
import operator
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.data.store import Row
from jaxmoe.errors import UserError

__all__ = ["Packed", "Rows", "Stream", "documents", "heldout_batches"]


class Rows(NamedTuple):
    """Of a batch: all of it, or what one process holds."""

    tokens: np.ndarray  # int32 [rows, seq_len + 1]
    weights: np.ndarray  # float32 [rows, seq_len]: 1 for a target that counts, 0 for padding


class Packed(NamedTuple):
    """The same where more than an eot ends a document: of a mix, or packed."""

    tokens: np.ndarray
    weights: np.ndarray
    documents: np.ndarray  # int32 [rows, seq_len], as `documents` numbers them


class Stream:
    """An endless shuffled stream of the sequences of `tokens`.

    Sequences of seq_len + 1 tokens are cut at stride seq_len, so that they overlap by one token and
    each token is a target once an epoch; the last incomplete sequence is left out. Every epoch is
    shuffled anew. `len` is the number of sequences of an epoch.

    Raises:
        UserError: `tokens` is too short for one sequence, or grain is missing.
    """

    def __init__(self, tokens: np.ndarray | Row, seq_len: int, seed: int) -> None:
        source = _Sequences(tokens, seq_len)
        if len(source) == 0:
            raise UserError(
                f"train.seq_len={seq_len} needs {seq_len + 1} tokens and the training text has "
                f"{len(tokens)}: shorten it or give more text"
            )
        self._length, self._seq_len = len(source), seq_len
        self._dataset = _map_dataset(source).shuffle(seed=_spread(seed)).repeat()
        # The same order of numbers: which sequence of the text a sample is.
        self._order = _map_dataset(range(len(source))).shuffle(seed=_spread(seed)).repeat()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """The sample at a global index of 0 or more, int32 [seq_len + 1]."""
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        return self._dataset[index]

    def start(self, index: int) -> int:
        """The token of the text that the sample at a global index begins with."""
        return int(self._order[index]) * self._seq_len

    def rows(self, position: int, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the global batch that begins at sample index `position`.

        int32 [stop - start, seq_len + 1].
        """
        return np.stack([self[position + row] for row in range(start, stop)])

    def epoch(self, position: int) -> int:
        """How often the whole text was read before sample index `position`."""
        return position // self._length


def heldout_batches(tokens: np.ndarray, seq_len: int, batch_size: int) -> list[Rows]:
    """Every token but the first (an eot) once as a target, in order.

    The last sequence and the last batch are filled up with the first token, at weight 0.

    Raises:
        UserError: fewer than two tokens.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise UserError(f"the held-out text has {len(tokens)} tokens: it needs at least 2")
    rows = -(-targets // (seq_len * batch_size)) * batch_size
    padded = np.full(rows * seq_len + 1, tokens[0], np.int32)
    padded[: len(tokens)] = tokens
    sequences = _Sequences(padded, seq_len)
    inputs = np.stack([sequences[row] for row in range(rows)])
    weights = (np.arange(rows * seq_len) < targets).astype(np.float32).reshape(rows, seq_len)
    return [
        Rows(inputs[i : i + batch_size], weights[i : i + batch_size])
        for i in range(0, rows, batch_size)
    ]


def documents(tokens: np.ndarray, eot: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Which document of its row each token is in: int32 of the shape [rows, seq_len] of `tokens`.

    They are numbered from 1 in each row; an eot belongs to the document that it ends. Where
    `weights` are 0 there is padding, which is 0 (its filling is eot, and would be documents).
    """
    ends = tokens == eot
    numbers = 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends
    return numbers if weights is None else np.where(weights > 0, numbers, 0)


class _Sequences:
    """Random-access source for grain."""

    def __init__(self, tokens: np.ndarray | Row, seq_len: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: Any) -> np.ndarray:
        start = operator.index(index) * self._seq_len
        return np.asarray(self._tokens[start : start + self._seq_len + 1], np.int32)

    def __repr__(self) -> str:  # without an address: grain compares it when it restores a state
        return f"Sequences(tokens={len(self._tokens)}, seq_len={self._seq_len})"


def _spread(seed: int) -> int:
    """Seed of grain's shuffle, which adds the epoch to it.

    Hashed, or else epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.sha256(f"jaxmoe order {seed}".encode()).digest()[:4], "little")


def _map_dataset(source: Any) -> Any:
    try:
        import grain
    except ImportError as error:
        raise UserError(f"the loader needs grain ({error}): pip install grain") from None
    return grain.MapDataset.source(source)
