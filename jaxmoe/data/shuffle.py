"""Random order by index, without memory: keys, hashes, and permutations that are computed.

Integer arithmetic alone, so that an order is the same under every version of every library
(numpy's generators promise no such thing).
"""

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np

__all__ = ["Permutation", "hashed", "make_key", "ranks"]

_ROUNDS = 4  # double ones; with three the 24 orders of four things are not yet equally likely
_CHUNK = 4096  # indices computed at a time, 0.6 ms: numpy's calls cost as much for one


def make_key(*parts: int | str) -> int:
    """64 bits that other parts do not share: of SHA-256 over what they are and how they follow."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(f"jaxmoe {text}".encode()).digest()[:8], "little")


def hashed(values: np.ndarray, key: int) -> np.ndarray:
    """uint64, near to independent draws: the finaliser of splitmix64 (Steele et al., OOPSLA 2014)
    over a Weyl sequence that starts at `key`."""
    x = np.asarray(values).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ranks(n: int, key: int) -> np.ndarray:
    """A random order of few things, held in memory: int64 [n], each of 0 .. n - 1 once."""
    order = np.argsort(hashed(np.arange(n), key), kind="stable")
    out = np.empty(n, np.int64)
    out[order] = np.arange(n)
    return out


class Permutation:
    """A random order of 0 .. n - 1 of which any part is computed where it is asked for.

    A Feistel network over Z_a x Z_b with a * b just over n (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002, section 5), walked again where it leaves the range: about one
    index in sqrt(n) is.
    """

    def __init__(self, n: int, key: int) -> None:
        assert n > 0, n
        self._n = n
        self._a = isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = [make_key("round", key, i) for i in range(2 * _ROUNDS)]
        self._chunk = lru_cache(maxsize=64)(self._compute)  # 2 MB

    def __len__(self) -> int:
        return self._n

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64, as `index`, whose values lie in 0 .. n - 1."""
        x = self._once(np.asarray(index, np.uint64))
        while (outside := x >= self._n).any():
            x[outside] = self._once(x[outside])
        return x.astype(np.int64)

    def at(self, index: int) -> int:
        """One value; those near it are kept for the next call."""
        assert 0 <= index < self._n, (index, self._n)
        return int(self._chunk(index // _CHUNK)[index % _CHUNK])

    def _compute(self, chunk: int) -> np.ndarray:
        return self(np.arange(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self._n)))

    def _once(self, x: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + hashed(right, first) % a) % a
            right = (right + hashed(left, second) % b) % b
        return left * b + right
