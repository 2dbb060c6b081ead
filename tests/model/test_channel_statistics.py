"""Kurtosis and its kin of each token: against scipy, and against the noise floor that normal channels have."""

import numpy as np
import pytest
import scipy.stats
import torch

from megatron_ext.model.channel_statistics import (
    TokenSums,
    floor_centred,
    floor_released,
    kurtosis_centred,
    kurtosis_released,
    max_to_mean,
    token_sums,
    variance,
)


def draw(tokens: int, width: int, degrees: float = 5.0) -> np.ndarray:
    """Channels with heavy tails, and a mean that is not 0."""
    return np.random.default_rng(width).standard_t(degrees, (tokens, width)) + 0.3


@pytest.mark.parametrize("width", [7, 64, 513])
def test_centred_is_that_of_scipy(width: int) -> None:
    x = draw(40, width)
    found = kurtosis_centred(token_sums(torch.from_numpy(x)), width)
    np.testing.assert_allclose(found, scipy.stats.kurtosis(x, axis=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [7, 64, 513])
def test_released_has_uncentred_fourth_powers_and_nothing_below_zero(width: int) -> None:
    x = torch.from_numpy(draw(40, width))
    expected = ((x**4).mean(1) / x.std(1) ** 4 - 3).relu()
    torch.testing.assert_close(kurtosis_released(token_sums(x), width), expected, rtol=1e-10, atol=1e-10)
    assert (kurtosis_released(token_sums(torch.randn(200, width) * 0.01), width) == 0).any()


def test_a_mean_that_is_not_zero_is_an_outlier_to_the_released_one_only() -> None:
    """N(0.5, 1): 1.5625 of excess that is not there."""
    sums = token_sums(torch.randn(200, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    assert float(kurtosis_released(sums, 20_000).mean()) == pytest.approx(1.5625, abs=0.02)
    assert float(kurtosis_centred(sums, 20_000).mean()) == pytest.approx(0.0, abs=0.02)


def test_one_massive_channel() -> None:
    x = torch.randn(100, 2048, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    seen = kurtosis_released(token_sums(x), 2048)
    assert float(seen.mean()) == pytest.approx(917, rel=0.2) and float(seen.max()) < 2048
    np.testing.assert_allclose(max_to_mean(token_sums(x), 2048), x.abs().amax(1) / x.abs().mean(1), rtol=1e-5)
    np.testing.assert_allclose(variance(token_sums(x), 2048), x.numpy().var(1), rtol=1e-5)


FLOORS = {256: 0.105, 512: 0.080, 768: 0.065, 1024: 0.057, 2048: 0.041, 4096: 0.030}
"""What the released script prints on normal noise, by width, to three decimals."""


@pytest.mark.parametrize(("width", "printed"), FLOORS.items())
def test_the_floor_is_that_of_the_table(width: int, printed: float) -> None:
    assert floor_released(width) == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("width", [64, 344, 2048])
def test_normal_noise_lies_at_the_floor(width: int) -> None:
    tokens = 8_000_000 // width
    sums = token_sums(torch.randn(tokens, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64))
    released, centred = kurtosis_released(sums, width), kurtosis_centred(sums, width)
    assert float(released.mean()) == pytest.approx(floor_released(width), rel=0.05, abs=3 * float(released.std()) / tokens**0.5)
    assert float(centred.mean()) == pytest.approx(floor_centred(width), abs=4 * float(centred.std()) / tokens**0.5)


def test_parts_of_the_channels_add_up() -> None:
    x = torch.from_numpy(draw(30, 90))
    parts = [token_sums(part) for part in x.split([50, 40], dim=1)]
    joined = TokenSums(parts[0].powers + parts[1].powers, torch.maximum(parts[0].largest, parts[1].largest))
    for measure in (kurtosis_released, kurtosis_centred, max_to_mean, variance):
        torch.testing.assert_close(measure(joined, 90), measure(token_sums(x), 90), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_lose_little(dtype: torch.dtype) -> None:
    x = torch.from_numpy(draw(50, 300)).to(dtype)
    for measure in (kurtosis_released, kurtosis_centred, max_to_mean, variance):
        torch.testing.assert_close(measure(token_sums(x), 300), measure(token_sums(x.double()), 300), rtol=1e-5, atol=1e-5)


def test_tokens_of_zeros_and_of_nan() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), float("nan")), torch.arange(8.0)])
    for measure in (kurtosis_released, kurtosis_centred, max_to_mean, variance):
        zeros, broken, good = measure(token_sums(x), 8).tolist()
        assert zeros == 0 and broken != broken and good == good
    assert kurtosis_released(token_sums(x[:0]), 8).shape == (0,)
