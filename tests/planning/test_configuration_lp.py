"""The bound from patterns of packs against every plan of tiny steps, the area bound, and cases by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, configuration_lp, lower_bound, plan_and_compare
from megatron_ext.planning.configuration_lp import CELLS, fill_cells, line_below
from megatron_ext.planning.cost_model import AttentionShape, Curve
from tests.planning.cases import cost_models, least_seconds

ROUNDING = 1 + 1e-9
COARSE = 0.99
"""Lengths of packs are told apart in a thousand classes: a bound may be so much below what it would be with more."""


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.integers(1, 4), cost_models(), st.booleans(), st.booleans())
def test_bound_is_below_the_best_of_all_plans_and_not_below_area(
    lengths: list[int], devices: int, cost: CostModel, in_rounds: bool, rings: bool
) -> None:
    largest = devices if rings else None
    most = cost.capacity(cost.degrees(devices, largest)[-1])
    lengths = [min(length, most) for length in lengths]
    best = least_seconds(lengths, devices, cost, in_rounds, largest)
    area, lp = (lower_bound(lengths, devices, cost, largest_degree=largest, in_rounds=in_rounds, method=each) for each in ("area", "lp"))
    assert area <= lp <= best * ROUNDING


@pytest.mark.parametrize("in_rounds", [False, True])
def test_bound_is_nearer_to_the_best_of_all_plans_than_area(in_rounds: bool) -> None:
    rng = np.random.default_rng(0)
    heads = AttentionShape(layers=1, query_heads=4)
    cost = CostModel(40, 1.0, 0.01, per_pack=10.0, attention=heads, all_to_all=(Curve.line(0.5, 20.0), Curve.line(1.0, 4.0)))
    tightness = []
    for _ in range(4):
        lengths = np.minimum(rng.lognormal(3.0, 1.0, 5).astype(int) + 1, 160).tolist()
        best = least_seconds(lengths, 4, cost, in_rounds)
        tightness.append([lower_bound(lengths, 4, cost, in_rounds=in_rounds, method=each) / best for each in ("area", "lp")])
    area, lp = np.mean(tightness, axis=0)
    print(f"bound / best of all, in_rounds={in_rounds}: area {area:.4f}, lp {lp:.4f}")
    assert area < lp <= np.max(tightness) <= ROUNDING


@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize(("documents", "devices", "best"), [(3, 1, 48.0), (12, 4, 48.0)])
def test_documents_that_do_not_share_memory(documents: int, devices: int, best: float, in_rounds: bool) -> None:
    # Each takes 0.6 of a rank's memory: three packs of ten seconds and six more on every rank, where tokens alone would need two.
    cost, lengths = CostModel(10, per_pack=10.0), [6] * documents
    area, lp = (lower_bound(lengths, devices, cost, largest_degree=1, in_rounds=in_rounds, method=each) for each in ("area", "lp"))
    assert area <= 38.0 * ROUNDING
    assert best * COARSE <= lp <= best


def test_documents_that_do_not_share_a_round() -> None:
    # Two ranks and three documents: a round of one document on each rank, and one of the third document; none is halved.
    cost = CostModel(10, per_pack=1.0)
    assert lower_bound([9, 9, 9], 2, cost, largest_degree=1, in_rounds=True) == pytest.approx(15.5)
    lp = lower_bound([9, 9, 9], 2, cost, largest_degree=1, in_rounds=True, method="lp")
    print(f"{lp:.2f} of 20 seconds")
    assert 15.5 <= lp <= 20.0


@pytest.mark.parametrize("in_rounds", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bound_of_many_documents_is_a_bound_wherever_pricing_stops(in_rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration_lp, "ITERATIONS", 15)
    lengths = np.minimum(np.random.default_rng(3).lognormal(3.0, 1.2, 24).astype(int) + 1, 300).tolist()
    curves = (Curve.line(0.0, 100.0), Curve.line(0.0, 50.0), Curve.line(0.0, 10.0))
    cost = CostModel(100, 1.0, 0.005, per_pack=20.0, attention=AttentionShape(1, 8), all_to_all=curves)
    planned = plan_and_compare(lengths, 4, cost, in_rounds=in_rounds, margin=0.0)
    first, second = (lower_bound(lengths, 4, cost, in_rounds=in_rounds, method="lp") for _ in range(2))
    assert first == second, "the same arguments give the same bound"
    assert planned.bound <= first <= planned.seconds * ROUNDING
    print(f"adaptive over area {planned.seconds / planned.bound:.4f}, over lp {planned.seconds / first:.4f}")


def test_documents_of_no_tokens() -> None:
    assert lower_bound([], 4, CostModel(10), method="lp") == 0.0
    assert lower_bound([0, 0], 4, CostModel(10), method="lp") == 0.0
    cost = CostModel(10, per_pack=1.0)
    assert lower_bound([0, 6, 0, 6], 2, cost, method="lp") == lower_bound([6, 6], 2, cost, method="lp")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="'volume'; accepted: area, lp"):
        lower_bound([1], 1, CostModel(10), method="volume")


@given(st.lists(st.tuples(st.integers(1, CELLS), st.floats(-1.0, 5.0)), max_size=7))
def test_knapsack_is_the_best_of_all_subsets(documents: list[tuple[int, float]]) -> None:
    cells, worth = np.array([each[0] for each in documents], dtype=np.int64), np.array([[each[1]] for each in documents]).reshape(-1, 1)
    found, taken = np.empty((len(cells) + 1, 1)), np.zeros((len(cells), 1, CELLS + 1), dtype=np.bool_)
    fill_cells(np.zeros((1, CELLS + 1)), cells, worth, found, taken)
    for count in range(len(cells) + 1):
        subsets = [[at for at in range(count) if number >> at & 1] for number in range(1 << count)]
        assert found[count, 0] == pytest.approx(max(worth[each, 0].sum() for each in subsets if cells[each].sum() <= CELLS))


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.0, 9.0)), min_size=1, max_size=6, unique_by=lambda each: each[0]))
def test_line_is_above_no_point(points: list[tuple[int, float]]) -> None:
    tokens, seconds = np.array(sorted(points)).T
    latency, rate = line_below(tokens, seconds, float((seconds / tokens).min()))
    assert latency >= 0 and rate >= 0
    assert (latency + rate * tokens <= seconds * ROUNDING + 1e-9).all()
