"""Bounds against every plan of tiny steps: no plan goes below the bound, and the adaptive plan does not go below the best of all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, lower_bound, plan_and_compare
from megatron_ext.planning.bounds import _least_work
from megatron_ext.planning.cost_model import AttentionShape, Curve
from megatron_ext.planning.exchange import ExchangeTable
from tests.planning.cases import cost_models, least_seconds

ROUNDING = 1 + 1e-9


@settings(deadline=None, max_examples=250)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.integers(1, 4), cost_models(), st.booleans(), st.booleans())
def test_bound_is_below_the_best_of_all_plans_and_adaptive_above(
    lengths: list[int], devices: int, cost: CostModel, in_rounds: bool, rings: bool
) -> None:
    largest = devices if rings else None
    most = cost.capacity(cost.degrees(devices, largest)[-1])
    lengths = [min(length, most) for length in lengths]
    best = least_seconds(lengths, devices, cost, in_rounds, largest)
    planned = plan_and_compare(lengths, devices, cost, in_rounds=in_rounds, largest_degree=largest, margin=0.0)
    assert planned.bound == lower_bound(lengths, devices, cost, in_rounds=in_rounds, largest_degree=largest)
    assert planned.bound <= best * ROUNDING
    assert best <= planned.seconds * ROUNDING, "a plan better than all plans: the enumeration is wrong"
    assert planned.seconds <= planned.static_seconds * ROUNDING


@pytest.mark.parametrize("in_rounds", [False, True])
def test_adaptive_is_near_the_best_of_all_plans(in_rounds: bool) -> None:
    rng = np.random.default_rng(0)
    heads = AttentionShape(layers=1, query_heads=4)
    cost = CostModel(40, 1.0, 0.01, per_pack=10.0, attention=heads, all_to_all=(Curve.line(0.5, 20.0), Curve.line(1.0, 4.0)))
    ratios, tightness = [], []
    for _ in range(20):
        lengths = np.minimum(rng.lognormal(3.0, 1.0, 5).astype(int) + 1, 160).tolist()
        planned = plan_and_compare(lengths, 4, cost, in_rounds=in_rounds, margin=0.0)
        best = least_seconds(lengths, 4, cost, in_rounds)
        ratios.append(planned.seconds / best)
        tightness.append(planned.bound / best)
    print(f"adaptive / best of all, in_rounds={in_rounds}: mean {np.mean(ratios):.4f}, max {max(ratios):.4f}")
    assert min(ratios) > 1 - 1e-9 and np.mean(ratios) < 1.05
    assert 0.97 < max(tightness) <= 1 + 1e-9, "a bound 3 % higher would be found to be wrong here"
    print(f"bound / best of all: mean {np.mean(tightness):.4f}, max {max(tightness):.4f}")


def test_bounds_of_cases_by_hand() -> None:
    assert lower_bound([], 4, CostModel(10)) == 0.0
    assert lower_bound([10], 1, CostModel(10)) == pytest.approx(10.0)
    assert lower_bound([10, 10, 10], 1, CostModel(10, per_pack=1.0)) == pytest.approx(33.0), "three packs, each full"
    assert lower_bound([4] * 4, 4, CostModel(10, per_pack=1.0)) == pytest.approx(5.0)
    # Two ranks, three full packs of ten: the second pack of a rank begins after its first.
    assert lower_bound([10, 10, 10], 2, CostModel(10, per_pack=10.0), largest_degree=1) == pytest.approx(35.0)
    assert lower_bound([10, 10, 10], 2, CostModel(10, per_pack=10.0), largest_degree=1, in_rounds=True) == pytest.approx(35.0)


def test_a_bound_of_a_longer_step_is_not_smaller() -> None:
    cost = CostModel(50, per_token_squared=0.01, per_pack=3.0)
    bounds = [lower_bound(list(range(1, count)), 4, cost) for count in range(2, 50)]
    assert bounds == sorted(bounds)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 5.0)), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_least_work_takes_the_lightest_tokens(documents: list[tuple[int, float]], part: float) -> None:
    lengths, work = np.array([d[0] for d in documents]), np.array([d[1] for d in documents])
    left = tokens = part * float(lengths.sum())
    expected = 0.0
    for rate, length in sorted(zip(work / lengths, lengths, strict=True)):
        expected += rate * min(length, left)
        left = max(0.0, left - length)
    assert _least_work(lengths, work, tokens) == pytest.approx(expected)


@settings(deadline=None)
@given(cost_models(), st.integers(1, 16))
def test_exchange_table_is_the_cost_model(cost: CostModel, devices: int) -> None:
    degrees = tuple(cost.degrees(devices, devices))
    table = ExchangeTable.of(cost, degrees)
    for row, degree in enumerate(degrees):
        tokens = np.arange(1, cost.capacity(degree) + 1, dtype=float)
        exact = cost.exchange_seconds(tokens, degree)
        np.testing.assert_allclose(np.interp(tokens, table.tokens[row], table.seconds[row]), exact, rtol=1e-9, atol=1e-12)
        assert table.least_rate(row) <= (exact / tokens).min() * ROUNDING + 1e-15
        np.testing.assert_allclose(table.at_least(row, tokens), np.minimum.accumulate(exact[::-1])[::-1], rtol=1e-9, atol=1e-12)


def test_a_document_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="document 1 has 21 tokens; a block of 2 ranks holds 20"):
        lower_bound([5, 21], 2, CostModel(10, attention=AttentionShape(query_heads=2)))
