import torch

from megatron_ext.kernels.minifloat import decode_e2m1, decode_e8m0
from megatron_ext.precision.formats import E2M1, E4M3, E5M2, E8M0, FORMATS, NumberFormat


def finite_numbers(of: NumberFormat) -> torch.Tensor:
    """All finite numbers of a format, by the definitions of the kernels or by PyTorch."""
    codes = torch.arange(1 << of.bits, dtype=torch.uint8)
    special = {E2M1.name: decode_e2m1, E8M0.name: decode_e8m0}
    numbers = special[of.name](codes) if of.name in special else codes.view(of.dtype).float()
    return numbers[numbers.isfinite()].double()


def test_tables_say_what_the_definitions_compute() -> None:
    for each in (E2M1, E4M3, E5M2, E8M0):
        numbers = finite_numbers(each)
        assert float(numbers.max()) == each.largest, each
        assert float(numbers[numbers > 0].min()) == each.smallest, each
        assert each.signed == bool((numbers < 0).any()), each
        one = 1.0 + 2.0**-each.mantissa_bits
        assert 1.0 in numbers and numbers[numbers > 1].min() == (one if each.mantissa_bits else 2.0), each
        assert each.smallest == 2.0 ** (1 - each.bias - each.mantissa_bits) or not each.signed, each
    assert float(finite_numbers(E2M1).max()) != E4M3.largest, "formats differ"


def test_bits_of_blocks() -> None:
    assert {name: each.bits_per_value for name, each in FORMATS.items()} == {
        "nvfp4": 4.5,
        "nvfp4_2d": 4 + 8 / 256,
        "mxfp4": 4.25,
        "mxfp8": 8.25,
        "fp8_tensorwise": 8,
        "fp8_rowwise": 8,
        "fp8_1x128": 8.25,
        "fp8_128x128": 8 + 32 / 16384,
    }
    assert [FORMATS[name].multiple for name in ("nvfp4", "mxfp8", "fp8_128x128", "fp8_rowwise")] == [16, 32, 128, 1]
