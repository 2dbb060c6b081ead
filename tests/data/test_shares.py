"""Shares as functions of tokens: integrals, their inverses, and turns that keep to them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.shares import ConstantShares, Fade, FadingShares, Shares, Turns

SHAPES = st.sampled_from(["linear", "cosine"])
PERCENT = st.integers(0, 99).map(lambda percent: percent / 100)
FADES = st.builds(Fade, PERCENT, PERCENT, st.integers(10, 5000), SHAPES)


def value(fade: Fade, at: float) -> float:
    """The share of the second mixture, by its definition."""
    part = min(1.0, at / fade.tokens)
    return fade.first + (fade.last - fade.first) * (part if fade.shape == "linear" else (1 - math.cos(math.pi * part)) / 2)


@given(fade=FADES, end=st.floats(1, 8000))
@settings(max_examples=60, deadline=None)
def test_integral_of_a_fade_is_that_of_its_value(fade: Fade, end: float) -> None:
    points = np.linspace(0, end, 4001)
    values = np.array([value(fade, at) for at in points])
    assert fade.integral(end) == pytest.approx(float(np.trapezoid(values, points)), rel=1e-4, abs=1e-4)


def test_a_fade_goes_from_one_share_to_the_other_and_stays() -> None:
    for shape in ("linear", "cosine"):
        fade = Fade(0.5, 0.1, 1000, shape)
        slope = [fade.integral(at + 1e-3) - fade.integral(at) for at in (0.0, 500.0, 1000.0, 5000.0)]
        assert np.array(slope) / 1e-3 == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=1e-4)


@given(fade=FADES, begin=st.integers(0, 4000), tokens=st.integers(0, 3000), length=st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_due_times_invert_the_integral(fade: Fade, begin: int, tokens: int, length: int) -> None:
    shares = FadingShares((0.7, 0.3, 0.0), (0.0, 0.0, 1.0), fade)
    assert sum(shares.amount(source, begin, begin + tokens) for source in range(3)) == pytest.approx(tokens)
    for source in range(3):
        start, end = shares.span(source, begin, tokens, length)
        for due, owed in ((start, tokens), (end, tokens + length)):
            if math.isfinite(due):
                assert shares.amount(source, begin, begin + due) == pytest.approx(owed, rel=1e-9, abs=1e-6)
            else:
                assert fade.last == 0.0 and shares.amount(source, begin, 10**9) < owed


def test_constant_shares_are_due_in_proportion_and_never_without_a_share() -> None:
    shares = ConstantShares.of([3, 1, 0])
    assert shares.shares == (0.75, 0.25, 0.0) and shares.amount(0, 100, 200) == 75
    assert shares.span(1, 10**6, 5, 3) == (20.0, 32.0)
    assert shares.span(2, 0, 0, 1) == (math.inf, math.inf)


@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=5, max_size=20), min_size=3, max_size=3),
    shares=st.builds(FadingShares, st.just((0.6, 0.4, 0.0)), st.just((0.0, 0.0, 1.0)), FADES) | st.just(ConstantShares.of([5, 0, 1])),
    begin=st.integers(0, 3000),
)
@settings(max_examples=80, deadline=None)
def test_turns_keep_every_source_at_its_integral_to_within_one_piece(lengths: list[list[int]], shares: Shares, begin: int) -> None:
    turns, taken, served = Turns(shares, begin), [0] * 3, [0] * 3
    for source in range(3):
        turns.offer(source, 0, lengths[source][0])
    longest = max(map(max, lengths))
    for _ in range(300):
        source = turns.next(sum(taken))
        taken[source] += lengths[source][served[source] % len(lengths[source])]
        served[source] += 1
        turns.offer(source, taken[source], lengths[source][served[source] % len(lengths[source])])
        for each, tokens in enumerate(taken):
            assert abs(tokens - shares.amount(each, begin, begin + sum(taken))) <= longest + 1e-6


def test_the_bound_needs_the_rule() -> None:
    """The control: first come, first served among sources that are behind breaks the bound."""
    shares, taken, worst = ConstantShares.of([98, 1, 1]), [0, 0, 0], 0.0
    for _ in range(300):
        source = next(i for i in (1, 2, 0) if taken[i] / shares.shares[i] <= sum(taken) + 200 * (i > 0))
        taken[source] += 16
        worst = max(worst, *(abs(tokens - shares.amount(i, 0, sum(taken))) for i, tokens in enumerate(taken)))
    assert worst > 16 + 1e-6
