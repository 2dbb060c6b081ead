"""Names of schemes, and that each is the kernel it says."""

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.fp8_quantize import fp8_dequantize, fp8_quantize
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize, mxfp4_quantize
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize
from megatron_ext.precision.integer import quantize_asymmetric, quantize_clipped, quantize_symmetric
from megatron_ext.precision.post_training import FLOATS, named_scheme


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(20, 72, generator=torch.Generator().manual_seed(0))


def test_integers(x: torch.Tensor) -> None:
    scheme = named_scheme("w4a8")
    assert scheme.name == "W4A8"
    assert torch.equal(scheme.weight(x), quantize_symmetric(x, 4))
    assert torch.equal(scheme.activation(x), quantize_symmetric(x, 8))
    scheme = named_scheme("W3A4", asymmetric=True, clip_weights=True)
    assert torch.equal(scheme.weight(x), quantize_clipped(x, 3))
    assert torch.equal(scheme.activation(x), quantize_asymmetric(x, 4))
    assert named_scheme("W4A16").activation is None
    assert named_scheme("W16A4").weight is None


def test_cache(x: torch.Tensor) -> None:
    heads = torch.cat([x, x, 3 * x], 1).view(4, 5, 216)
    scheme = named_scheme("w4a8kv3")
    assert scheme.name == "W4A8KV3"
    expected = torch.cat([quantize_asymmetric(heads[..., :128], 3), quantize_asymmetric(heads[..., 128:], 3)], -1)
    assert torch.equal(scheme.cache(heads), expected)
    assert not torch.equal(expected, quantize_asymmetric(heads, 3)), "groups of 128 channels have scales of their own"
    assert named_scheme("W4A4").cache is None and named_scheme("W4A4KV16").cache is None and named_scheme("nvfp4").cache is None
    only = named_scheme("W16A16KV4")
    assert only.weight is None and only.activation is None and only.cache is not None


def test_floats(x: torch.Tensor) -> None:
    expected = {
        "nvfp4": nvfp4_dequantize(nvfp4_quantize(x, backend="torch"), torch.float32, backend="torch"),
        "mxfp4": mxfp4_dequantize(mxfp4_quantize(x), torch.float32)[:, :72],
        "mxfp8": fp8_dequantize(fp8_quantize(x, scaling="mx", backend="torch"), torch.float32, backend="torch"),
        "fp8_rowwise": fp8_dequantize(fp8_quantize(x, scaling="rowwise", backend="torch"), torch.float32, backend="torch"),
    }
    assert expected.keys() == FLOATS.keys()
    for name, values in expected.items():
        scheme = named_scheme(name.upper())
        assert torch.equal(scheme.weight(x), values) and torch.equal(scheme.activation(x), values)
        assert scheme.weight(x.bfloat16()).dtype == torch.bfloat16
    errors = [float((values - x).norm() / x.norm()) for values in expected.values()]
    assert errors[0] < errors[1] and max(errors[2:]) < min(errors[:2]) / 2, "8 bits are nearer than 4, small blocks nearer than large"


@pytest.mark.parametrize("name", ["W16A16", "W16A16KV16", "W4A4KV9", "W4A4KV", "W1A8", "W9A9", "int8", "W4", "", "nvfp4 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="quantization scheme .* accepted: WxAy or WxAyKVz with 2 to 8 or 16"):
        named_scheme(name)
