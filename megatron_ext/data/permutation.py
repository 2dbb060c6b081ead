"""A random order of n documents that needs no memory: a keyed permutation computed one position at a time.

A Feistel network over the smallest even number of bits that holds n, with cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary
Finite Domains"): a value that falls outside [0, n) is permuted again until it falls inside. The order is a pure function of
(seed, position), so any rank can start anywhere.
"""

import hashlib

import numpy as np

ROUNDS = 4
_MASK64 = (1 << 64) - 1


def _mix(value: int, key: int) -> int:
    """A 64-bit hash of ``value`` under ``key`` (the finalizer of splitmix64)."""
    value = (value + key) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def hashes(values: np.ndarray, seed: str) -> np.ndarray:
    """64-bit hashes of integers under ``seed`` (any string), uint64 of the same shape; equal on every machine."""
    key = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
    hashed = values.astype(np.uint64) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashed = (hashed ^ (hashed >> np.uint64(shift))) * np.uint64(factor)
    return hashed ^ (hashed >> np.uint64(31))


class Permutation:
    """Permutation of ``range(size)`` chosen by ``seed`` (any string); ``permutation[i]`` is the i-th item of the shuffled order."""

    def __init__(self, size: int, seed: str) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(seed.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size}")
        value = self._encrypt(position)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << self._half_bits) | right
