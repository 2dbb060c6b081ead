"""Digests against big integers, and over all ways to divide a tensor."""

import struct
from itertools import product

import pytest
import torch

from megatron_ext.optim.digests import MODULUS, part_digest, summed
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.placement import slices, whole_box

SHAPE = torch.Size((5, 6))


def values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def whole(tensor: torch.Tensor) -> tuple[int, float]:
    return part_digest(OwnedBox("a", whole_box(tensor.shape), 0), tensor, tensor.shape)


def mixed(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    number = (number ^ number >> 27) * 0x94D049BB133111EB % MODULUS
    return number ^ number >> 31


def test_is_the_sum_of_hashes_of_places_and_bits() -> None:
    expected = 0
    for place, value in enumerate(values().flatten().tolist(), start=1):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        expected += mixed(mixed(place * 0x9E3779B97F4A7C15 % MODULUS) ^ bits % MODULUS)
    total, squares = whole(values())
    assert total == expected % MODULUS
    assert squares == pytest.approx(float(values().double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_sum_to_the_whole_however_it_is_divided(dtype: torch.dtype) -> None:
    for rows, columns in product((1, 3, 4), (2, 5)):
        boxes = [((a, b), (c, d)) for a, b in ((0, rows), (rows, 5)) for c, d in ((0, columns), (columns, 6))]
        tensor = values(dtype)
        parts = [part_digest(OwnedBox("a", box, 0), tensor[slices(box, whole_box(SHAPE))], SHAPE) for box in boxes]
        assert summed(parts)[0] == whole(tensor)[0]


def test_a_bit_and_an_exchange_are_seen() -> None:
    changed, exchanged = values(), values()
    changed.view(torch.int32)[2, 3] ^= 1
    exchanged[0, 0], exchanged[4, 5] = values()[4, 5], values()[0, 0]
    assert len({whole(tensor)[0] for tensor in (values(), changed, exchanged)}) == 3


def test_a_number_without_dimensions_has_one_too() -> None:
    assert whole(torch.tensor(1.5))[0] != whole(torch.tensor(2.5))[0]
