"""Lengths of documents drawn from simple distributions, for simulations where no measured ones are at hand."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import one_of


@dataclass(frozen=True)
class LengthDistribution:
    """A lognormal body whose upper end is a Pareto tail, because a lognormal alone has too few long documents.

    The share of documents in the tail is what the lognormal has above ``tail_from``, so that quantiles are continuous there.
    """

    description: str
    log_median: float
    log_deviation: float
    tail_from: float
    """Tokens."""
    tail_exponent: float
    """Of the tail's survival function: (tokens / ``tail_from``) ** -exponent."""
    longest: int = 2**21
    """Tokens; the tail is cut here."""

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Tokens of ``count`` documents, each at least 1."""
        tokens = np.exp(self.log_median + self.log_deviation * rng.standard_normal(count))
        tail = tokens > self.tail_from
        share = rng.random(int(tail.sum())) * (1.0 - (self.tail_from / self.longest) ** self.tail_exponent)
        tokens[tail] = self.tail_from * (1.0 - share) ** (-1.0 / self.tail_exponent)
        return np.maximum(1, np.rint(tokens)).astype(np.int64)


def length_distribution(name: str) -> LengthDistribution:
    """The distribution of this name.

    ``wikipedia-like`` follows the lengths that FlexSP (Wang et al. 2025, arXiv:2412.01523) published with its code: within 6 % of their
    mean and of their quantiles from p50 to p99.9. ``github-like`` has the tail of ByteScale's GitHub data (Ge et al. 2025,
    arXiv:2502.21231, figure 4): 16.2 % of tokens in documents over 128 Ki tokens, 9.8 % in those over 256 Ki. Its body is assumed: median
    403, deviation 2.

    Raises:
        ConfigError: no distribution has this name.
    """
    match name:
        case "wikipedia-like":
            return LengthDistribution("fitted to published lengths of Wikipedia", 5.80, 1.48, 9500.0, 1.74)
        case "github-like":
            return LengthDistribution("tail of GitHub as published, body assumed", 6.0, 2.0, 23140.0, 1.51)
    raise ConfigError(f"lengths: {name!r}; accepted: {one_of(['wikipedia-like', 'github-like'], name)}")


def with_tail_weight(lengths: NDArray[np.integer], weight: float, quantile: float = 0.95) -> NDArray[np.int64]:
    """The same lengths with the part above a quantile q made heavier or lighter: q (tokens / q) ** ``weight``, at least 1 token."""
    tokens = np.asarray(lengths, dtype=np.float64)
    begin = np.quantile(tokens, quantile)
    tokens = np.where(tokens > begin, begin * (tokens / begin) ** weight, tokens)
    return np.maximum(1, np.rint(tokens)).astype(np.int64)
