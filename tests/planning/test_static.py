import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, plan_step
from megatron_ext.planning.cost_model import AttentionShape
from megatron_ext.planning.static import best_static, static
from megatron_ext.planning.step import Step
from megatron_ext.planning.timeline import pack_seconds, timeline
from tests.planning.cases import cost_models

STEPS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def data_parallel(lengths: list[int], ranks: int, capacity: int):
    return plan_step(lengths, ranks, CostModel(capacity), "data_parallel")


@settings(deadline=None)
@given(lengths=STEPS, ranks=st.integers(1, 8), capacity=st.integers(40, 100))
def test_whole_documents_each_once_in_packs_that_fit(lengths: list[int], ranks: int, capacity: int) -> None:
    plan = data_parallel(lengths, ranks, capacity)
    slices = [piece for pack in plan.packs for piece in pack.slices]
    assert sorted((s.document, s.start, s.stop) for s in slices) == [(d, 0, length) for d, length in enumerate(lengths)]
    assert all(pack.tokens <= capacity and pack.degree == 1 for pack in plan.packs)
    assert sum(len(plan.packs_of(rank)) for rank in range(ranks)) == len(plan.packs)


@settings(deadline=None)
@given(lengths=STEPS, ranks=st.integers(1, 8), capacity=st.integers(40, 100))
def test_loads_differ_by_less_than_the_largest_pack(lengths: list[int], ranks: int, capacity: int) -> None:
    plan = data_parallel(lengths, ranks, capacity)
    loads = [sum(pack.tokens for pack in plan.packs_of(rank)) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(pack.tokens for pack in plan.packs)


@settings(deadline=None)
@given(lengths=STEPS, capacity=st.integers(40, 100))
def test_packs_do_not_depend_on_the_number_of_ranks(lengths: list[int], capacity: int) -> None:
    """So that a change of the grid changes where a pack is computed and not what is in it."""
    plans = [data_parallel(lengths, ranks, capacity) for ranks in (1, 3, 8)]
    assert len({tuple(pack.slices for pack in plan.packs) for plan in plans}) == 1


def test_an_empty_step_has_an_empty_plan() -> None:
    assert data_parallel([], 3, 10).packs == ()


def test_more_ranks_than_packs_leave_some_without_work() -> None:
    assert [len(data_parallel([5, 5], 4, 10).packs_of(rank)) for rank in range(4)] == [1, 0, 0, 0]


def test_static_uses_the_whole_blocks_that_there_are() -> None:
    plan = plan_step([20] * 6, 7, CostModel(10, attention=AttentionShape(query_heads=4)), "static", degree=2)
    assert [(pack.first_rank, pack.degree) for pack in plan.packs] == [(0, 2), (2, 2), (4, 2)] * 2


def test_static_leaves_no_block_idle_that_smaller_packs_would_use() -> None:
    lengths, cost = [10] * 8, CostModel(40, per_pack=1.0)
    full = plan_step(lengths, 4, cost, "data_parallel")
    even = plan_step(lengths, 4, cost, "static", degree=1)
    assert [len(pack.slices) for pack in full.packs] == [4, 4]
    assert [len(pack.slices) for pack in even.packs] == [2, 2, 2, 2]


def test_static_in_rounds_puts_packs_of_like_seconds_together() -> None:
    plan = plan_step([9, 2, 9, 2], 2, CostModel(10), "data_parallel", in_rounds=True)
    assert [[piece.document for piece in pack.slices] for pack in plan.packs] == [[0], [2], [1, 3], []]


@settings(deadline=None)
@given(lengths=STEPS, devices=st.integers(1, 20), cost=cost_models(), in_rounds=st.booleans())
def test_best_static_is_the_best_of_all_degrees(lengths: list[int], devices: int, cost: CostModel, in_rounds: bool) -> None:
    most = cost.capacity(cost.degrees(devices)[-1])
    step = Step.of([min(length, most) for length in lengths], devices, cost, None, in_rounds)
    fitting = [degree for degree in step.degrees if cost.capacity(degree) >= step.lengths.max()]
    every = [static(step, degree).seconds(step) for degree in fitting]
    best = best_static(step)
    assert best is not None and best[0].seconds(step) == min(every)
    assert best_static(step, below=min(every) * 0.999) is None or min(every) == 0
    plan = best[0].plan(step)
    assert timeline(plan, pack_seconds(plan, cost)).seconds == pytest.approx(min(every))


@pytest.mark.parametrize(
    ("policy", "degree", "message"),
    [
        ("guess", None, r"planning\.policy is 'guess'; accepted: adaptive, best_static, data_parallel, static"),
        ("static", None, r"planning\.degree is null; accepted with planning\.policy=static: 1, 2, 4"),
        ("static", 3, r"planning\.degree is 3; accepted for 6 ranks: 1, 2, 4"),
        ("static", 8, r"planning\.degree is 8; accepted for 6 ranks: 1, 2, 4"),
        (
            "static",
            1,
            r"document 1 has 11 tokens; 1 rank holds 10: raise planning\.tokens_per_pack or planning\.largest_degree",
        ),
        ("data_parallel", None, "document 1 has 11 tokens; 1 rank holds 10"),
    ],
)
def test_what_cannot_be_is_refused(policy: str, degree: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_step([5, 11], 6, CostModel(10, attention=AttentionShape(query_heads=4)), policy, degree=degree)
