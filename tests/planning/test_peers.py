from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve
from megatron_ext.planning.peers.bytescale import bytescale, equal_buckets, minimal_ranks
from megatron_ext.planning.peers.flexsp import FlexSPResult, blaster, bucket_limits, flexsp
from megatron_ext.planning.peers.flexsp_milp import homogeneous, makespan, solve_groups
from megatron_ext.planning.peers.layout import Group, lay_out
from megatron_ext.planning.peers.megatron_dcp import LoadedGroup, fill_idle_ranks, megatron_dcp, next_micro_batch
from megatron_ext.planning.peers.wlb import wlb
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.timeline import pack_seconds, timeline

COST = CostModel(
    tokens_per_rank=100,
    per_token=1e-3,
    per_token_squared=1e-5,
    per_pack=0.05,
    attention=AttentionShape(layers=2, query_heads=4, kv_heads=4, head_dim=8),
    all_to_all=(Curve.line(0.0, 1e6), Curve.line(0.0, 1e5)),
)
STEPS = st.lists(st.integers(1, 400), min_size=1, max_size=40)
Peer = Callable[..., Plan]


def quick_flexsp(lengths: list[int], devices: int, cost: CostModel, *, in_rounds: bool = False) -> Plan:
    return flexsp(lengths, devices, cost, time_limit=0.05, tries=1, buckets=4, in_rounds=in_rounds).plan


@pytest.mark.parametrize("peer", [megatron_dcp, bytescale, wlb], ids=["megatron_dcp", "bytescale", "wlb"])
@given(lengths=STEPS, devices=st.sampled_from([4, 6, 8]), in_rounds=st.booleans())
def test_plans_are_valid(peer: Peer, lengths: list[int], devices: int, in_rounds: bool) -> None:
    plan = peer(lengths, devices, COST, in_rounds=in_rounds)
    plan.validate(lengths, COST.tokens_per_rank)
    assert plan.in_rounds == in_rounds and plan.num_ranks == devices
    assert all(pack.ring == COST.ring_of(pack.degree) for pack in plan.packs)
    assert peer(lengths, devices, COST, in_rounds=in_rounds) == plan, "a pure function of its input"


@settings(max_examples=12, deadline=None)
@given(lengths=STEPS, devices=st.sampled_from([4, 6, 8]), in_rounds=st.booleans())
def test_plans_of_flexsp_are_valid(lengths: list[int], devices: int, in_rounds: bool) -> None:
    plan = quick_flexsp(lengths, devices, COST, in_rounds=in_rounds)
    plan.validate(lengths, COST.tokens_per_rank)
    assert plan.in_rounds == in_rounds


@pytest.mark.parametrize("peer", [megatron_dcp, bytescale, wlb, quick_flexsp])
def test_a_document_that_fits_no_block_is_refused(peer: Peer) -> None:
    with pytest.raises(ConfigError, match="document 1 has 401 tokens; 4 ranks hold 400"):
        peer([5, 401], 8, COST)


@pytest.mark.parametrize("peer", [megatron_dcp, bytescale, wlb, quick_flexsp])
def test_an_empty_step_has_a_plan(peer: Peer) -> None:
    assert all(not pack.slices for pack in peer([], 4, COST, in_rounds=True).packs)
    assert peer([], 4, COST).packs == ()


def test_layout_puts_large_groups_first_and_fills_rounds() -> None:
    plan = lay_out([[Group(1, [0]), Group(4, [1]), Group(2, [2])], [Group(2, [3])]], [9, 9, 9, 9], 8, COST, in_rounds=True)
    plan.validate([9] * 4, 100)
    assert [(pack.first_rank, pack.degree) for pack in plan.packs if pack.slices] == [(0, 4), (4, 2), (6, 1), (0, 2)]
    assert len(plan.packs_of(7)) == 2


# FlexSP


def test_blaster_cuts_where_the_largest_run_is_smallest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 50, 9).tolist()
        ordered = sorted(lengths, reverse=True)
        for count in (1, 2, 3, 4):
            runs = blaster(lengths, count)
            assert [lengths[document] for run in runs for document in run] == ordered
            least = min(
                max(sum(ordered[a:b]) for a, b in zip((0, *cuts), (*cuts, 9), strict=True)) for cuts in combinations(range(10), count - 1)
            )
            assert max(sum(lengths[document] for document in run) for run in runs) == least and len(runs) <= count


def test_buckets_have_the_least_error_of_all() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = np.sort(rng.integers(1, 30, 12))
        for count in (1, 2, 3, 4, 20):
            limits = bucket_limits(lengths, count)
            values = np.unique(lengths)
            error = int((limits[np.searchsorted(limits, lengths)] - lengths).sum())
            choices = [np.array([*inner, values[-1]]) for inner in combinations(values[:-1], min(count, len(values)) - 1)]
            assert error == min(int((each[np.searchsorted(each, lengths)] - lengths).sum()) for each in choices)
            assert len(limits) <= count


def brute_force(lengths: list[int], devices: int, degrees: list[int]) -> float:
    """Least makespan of one micro-batch over all groups and assignments."""
    best = float("inf")
    for sizes in product(degrees, repeat=2):
        if sum(sizes) > devices:
            continue
        for places in product(range(2), repeat=len(lengths)):
            groups = [Group(size, [d for d, place in enumerate(places) if place == g]) for g, size in enumerate(sizes)]
            if all(sum(lengths[d] for d in group.documents) <= COST.capacity(group.degree) for group in groups):
                best = min(best, makespan(groups, lengths, COST))
    return min(best, makespan([Group(4, [*range(len(lengths))])], lengths, COST) if sum(lengths) <= 400 else best)


@pytest.mark.parametrize("lengths", [[90, 150, 30], [60, 60, 190], [10, 20, 30, 120], [99, 99]])
def test_the_milp_finds_the_optimum_of_a_small_micro_batch(lengths: list[int]) -> None:
    """With a bucket for every length it solves the original problem; at most two groups are best for these."""
    solved = solve_groups(range(len(lengths)), lengths, 4, COST, [1, 2, 4], 16, time_limit=10.0)
    assert solved is not None
    assert solved.seconds <= brute_force(lengths, 4, [1, 2, 4]) * (1 + 1e-9)
    assert solved.seconds == makespan(solved.groups, lengths, COST)


def test_the_milp_is_never_worse_than_its_start_and_sometimes_better() -> None:
    lengths = [201, 123, 47, 10, 33, 64, 9, 49]
    start = homogeneous(range(8), lengths, 8, COST, [1, 2, 4])
    solved = solve_groups(range(8), lengths, 8, COST, [1, 2, 4], 16, time_limit=10.0)
    assert start is not None and solved is not None
    assert solved.seconds < 0.99 * start.seconds, (solved, start)
    without_time = solve_groups(range(8), lengths, 8, COST, [1, 2, 4], 16, time_limit=0.0)
    assert without_time is not None and without_time.seconds <= start.seconds


def test_micro_batches_that_do_not_fit_have_no_groups() -> None:
    assert solve_groups([0, 1], [300, 300], 4, COST, [1, 2, 4], 4, time_limit=1.0) is None


def test_flexsp_counts_its_work() -> None:
    result = flexsp([90] * 8, 4, COST, time_limit=0.05, tries=2)
    assert isinstance(result, FlexSPResult)
    assert result.milps == 2 + 3 and 0 < result.parallel_seconds < 60
    with pytest.raises(ConfigError, match="smallest_degree: 8; accepted: at most 4"):
        flexsp([9], 4, COST, smallest_degree=8)
    skips = flexsp([9] * 8, 4, COST, time_limit=0.05, smallest_degree=2).plan
    assert {pack.degree for pack in skips.packs} <= {2, 4}


# Megatron-LM


def test_dcp_begins_with_the_fewest_ranks_and_lowers_the_largest_load() -> None:
    lengths = [200, 100, 100, 50]
    groups, left = next_micro_batch([0, 1, 2, 3], lengths, [2, 1, 1, 1], [1, 2, 4], 8, 100)
    # 200 on two ranks: load 20000, at most 21000. The others do not raise it; the fewest ranks are taken.
    assert [(group.degree, group.documents) for group in groups] == [(2, [0]), (1, [1]), (1, [2]), (1, [3])] and left == []
    fill_idle_ranks(groups, [1, 2, 4], 8)
    assert [group.degree for group in groups] == [2, 2, 2, 2]


def test_dcp_leaves_what_has_no_room() -> None:
    groups, left = next_micro_batch([0, 1, 2], [100, 100, 100], [1, 1, 1], [1, 2], 2, 100)
    assert [group.documents for group in groups] == [[0], [1]] and left == [2]
    alone = LoadedGroup(1)
    alone.add(0, 9)
    fill_idle_ranks([alone], [1, 2], 3)
    assert alone.degree == 2, "no block of four ranks among three"


def test_dcp_does_not_look_at_exchanges() -> None:
    """A defect of the original that is kept: a slow link changes nothing."""
    slow = CostModel(100, attention=COST.attention, all_to_all=(Curve.line(9.0, 1.0),))
    assert megatron_dcp([200, 100, 100, 50], 8, slow) == megatron_dcp([200, 100, 100, 50], 8, COST)


# ByteScale


def test_bytescale_takes_the_fewest_ranks() -> None:
    units = minimal_ranks([250, 40, 150, 60, 100], 8, COST)
    assert sorted((unit.degree, sorted(unit.documents)) for unit in units) == [(1, [1, 3]), (1, [4]), (2, [2]), (4, [0])]
    plan = bytescale([250, 40, 150, 60, 100], 8, COST)
    assert {(pack.first_rank, pack.degree) for pack in plan.packs} == {(0, 4), (4, 2), (6, 1), (7, 1)}


def test_equal_buckets_keep_the_order() -> None:
    runs = equal_buckets([3, 0, 2, 1], [1.0, 2.0, 1.0, 4.0], 2)
    assert [list(run) for run in runs] == [[3], [0, 2, 1]]
    assert equal_buckets([], [], 4) == []


@given(STEPS)
def test_bytescale_loads_differ_by_no_more_than_a_unit(lengths: list[int]) -> None:
    plan = bytescale(lengths, 4, COST)
    units = [sum(COST.work([len(part) for part in pack.slices])) / pack.degree for pack in plan.packs]
    loads = [sum(unit for unit, pack in zip(units, plan.packs, strict=True) if rank in pack.ranks) for rank in range(4)]
    largest = [unit * pack.degree for unit, pack in zip(units, plan.packs, strict=True)]
    assert max(loads) <= sum(largest) / 4 + 2 * max(units) + 1e-9


# WLB-LLM


def test_wlb_balances_work_rather_than_tokens() -> None:
    plan = wlb([90, 30, 30, 30], 2, COST, degree=1)
    packs = sorted(sorted(len(part) for part in pack.slices) for pack in plan.packs)
    assert packs == [[30, 30, 30], [90]]
    assert all(pack.degree == 1 for pack in plan.packs)


def test_wlb_takes_the_degree_it_is_given_or_the_fastest() -> None:
    lengths = [90] * 8 + [10] * 20
    given_degree = {degree: wlb(lengths, 4, COST, degree=degree, in_rounds=True) for degree in (1, 2, 4)}
    assert all(pack.degree == degree for degree, plan in given_degree.items() for pack in plan.packs if pack.slices)
    seconds = {degree: timeline(plan, pack_seconds(plan, COST)).seconds for degree, plan in given_degree.items()}
    assert wlb(lengths, 4, COST, in_rounds=True) == given_degree[min(seconds, key=seconds.__getitem__)]
    with pytest.raises(ConfigError, match="degree: 3; accepted: 1, 2, 4"):
        wlb(lengths, 4, COST, degree=3)
    with pytest.raises(ConfigError, match="document 0 has 150 tokens; 1 ranks hold 100"):
        wlb([150], 4, COST, degree=1)


def test_wlb_puts_packs_of_like_work_in_one_round() -> None:
    plan = wlb([95, 94, 20, 19], 2, COST, degree=1, in_rounds=True)
    rounds = [{len(part) for pack in plan.packs[begin : begin + 2] for part in pack.slices} for begin in (0, 2)]
    assert rounds in ([{95, 94}, {20, 19}], [{95, 94, 20, 19}, set()])
