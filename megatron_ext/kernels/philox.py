"""Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) in PyTorch: the definition of what csrc/common/philox.h computes."""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> list[Tensor]:
    """Four random words of 32 bits as a function of four words, all int64 tensors of one shape, and of a key of 64 bits."""
    c0, c1, c2, c3 = counter
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = [(key + step) & _WORD for key, step in zip(keys, KEY_STEPS, strict=True)]
    return [c0, c1, c2, c3]


def block_random(seed: int, stream: int, rows: Tensor, blocks: Tensor) -> Tensor:
    """Random bytes [..., 16] (int64) of the blocks of 16 values at ``rows``, ``blocks`` [...] of a whole matrix.

    They depend on nothing else than the place, the seed and the stream, so that no tiling and no sharding changes them.
    """
    rows, blocks = torch.broadcast_tensors(rows, blocks)
    words = philox4x32((blocks & _WORD, rows & _WORD, rows >> 32, torch.full_like(rows, stream)), seed)
    return torch.stack([word >> shift & 255 for word in words for shift in (0, 8, 16, 24)], -1)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a product of two words, which int64 does not hold in one piece."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
