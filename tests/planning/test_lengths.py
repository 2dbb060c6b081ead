import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning.lengths import length_distribution, with_tail_weight

DRAWN = 2_000_000


def test_wikipedia_like_has_the_published_mean_and_quantiles() -> None:
    lengths = length_distribution("wikipedia-like").sample(DRAWN, np.random.default_rng(0))
    published = [347, 862, 2112, 3720, 10919, 37353]
    assert np.quantile(lengths, [0.5, 0.75, 0.9, 0.95, 0.99, 0.999]) == pytest.approx(published, rel=0.07)
    assert lengths.mean() == pytest.approx(1014, rel=0.07)
    assert lengths.min() >= 1 and lengths.max() <= 2**21 and lengths.dtype == np.int64


def test_the_tail_is_what_fits() -> None:
    """A negative control: the published lognormal alone misses the long documents by half."""
    rng = np.random.default_rng(0)
    lognormal = np.exp(5.950 + 1.258 * rng.standard_normal(DRAWN))
    assert np.quantile(lognormal, 0.999) < 0.6 * 37353


def test_github_like_has_the_published_shares_of_tokens() -> None:
    lengths = length_distribution("github-like").sample(4 * DRAWN, np.random.default_rng(0))
    shares = [lengths[lengths > limit].sum() / lengths.sum() for limit in (128 * 1024, 256 * 1024)]
    assert shares == pytest.approx([0.162, 0.098], rel=0.05)


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ConfigError, match="'wiki-like'; accepted: wikipedia-like, github-like; nearest: wikipedia-like"):
        length_distribution("wiki-like")


def test_tail_weight_changes_only_the_tail() -> None:
    lengths = np.arange(1, 1001)
    assert (with_tail_weight(lengths, 1.0) == lengths).all()
    heavier = with_tail_weight(lengths, 1.5)
    assert (heavier[:950] == lengths[:950]).all() and (heavier[960:] > lengths[960:]).all()
    assert heavier[-1] == round(950.05 * (1000 / 950.05) ** 1.5)
