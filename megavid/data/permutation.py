"""A keyed permutation of 0 .. n-1 that needs no list: a Feistel network with cycle walking.

A shuffled list of a billion samples would take 8 GB on every rank; this takes a few words.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking); the round function is the
finaliser of SplitMix64 (Steele et al. 2014), which is a hash of good quality and not a cipher: nothing here
is secret.
"""

import numpy as np
from numpy.typing import NDArray

from megavid.ops.philox import key_of

Words = NDArray[np.uint64]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """A permutation of ``range(size)``, a pure function of (size, parts).

    Args:
        size: from 1 to 2**62.
        parts: what names it, such as a seed, a purpose and an epoch.
    """

    def __init__(self, size: int, *parts: int | str) -> None:
        assert 1 <= size <= 1 << 62, f"permutation of {size} elements"
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        low, high = key_of(*parts)
        key = low | high << 32
        self._round_keys = [(key + _GOLDEN * (number + 1)) & (1 << 64) - 1 for number in range(_ROUNDS)]

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of ``places``, each from 0 to size - 1; same shape."""
        words = places.astype(np.uint64)
        out = self._network(words)
        # The network permutes a power of four that is less than 4 * size (or 4), so a walk ends after 4
        # rounds on average.
        while (outside := np.flatnonzero(out >= self.size)).size:
            out[outside] = self._network(out[outside])
        return out.astype(np.int64)

    def _network(self, words: Words) -> Words:
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = words >> half, words & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
        return (left << half) | right
