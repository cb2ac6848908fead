"""Documents that come again: identical ones by hash, near ones by MinHash over runs of tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.errors import UserError

__all__ = ["PERMUTATIONS", "Near", "signatures"]

PERMUTATIONS = 128
THRESHOLD = 0.8  # Jaccard of the sets of 5-grams; Gopher's (arXiv:2112.11446, appendix A.1.1)
_GRAM = 5  # tokens
_BANDS = 16  # of 8 rows: finds 95 % at a Jaccard of 0.8, and checks 6 % at 0.5
_SEED = 7


def signatures(documents: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of each document's set of 5-grams of ids: uint32 [documents, 128].

    Broder, On the resemblance and containment of documents (1997).
    """
    rensa = _rensa()
    grams = [_grams(ids) for ids in documents]
    offsets = np.cumsum([0, *map(len, grams)]).astype(np.uint64)
    flat = np.concatenate([np.empty(0, np.uint64), *grams])
    if not documents:
        return np.empty((0, PERMUTATIONS), np.uint32)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(documents), PERMUTATIONS)


class Near:
    """The signatures kept so far, found again by bands of them (about 2 kB a document)."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._bands: list[dict[bytes, int]] = [{} for _ in range(_BANDS)]

    def is_new(self, signature: np.ndarray) -> bool:
        """Whether no kept document is near; then this one is kept, too."""
        rows = signature.reshape(_BANDS, -1)
        keys = [row.tobytes() for row in rows]
        for at in {band[key] for band, key in zip(self._bands, keys, strict=True) if key in band}:
            if np.count_nonzero(self._kept[at] == signature) >= THRESHOLD * PERMUTATIONS:
                return False
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, len(self._kept))
        self._kept.append(signature)
        return True


def _grams(ids: np.ndarray) -> np.ndarray:
    """uint64 [at least 1]: a hash of every run of five ids; of all of a shorter document."""
    size = min(_GRAM, max(1, len(ids)))
    if not len(ids):
        return np.zeros(1, np.uint64)
    count = len(ids) - size + 1
    mixed = np.zeros(count, np.uint64)
    for i in range(size):
        mixed = (mixed ^ ids[i : i + count].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise UserError(
            f"--near-duplicates needs rensa ({error}): pip install 'jaxmoe[data]'"
        ) from None
    return rensa
