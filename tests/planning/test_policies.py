import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, plan_step

STEPS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=STEPS, ranks=st.integers(1, 8), capacity=st.integers(40, 100))
def test_whole_documents_each_once_in_packs_that_fit(lengths: list[int], ranks: int, capacity: int) -> None:
    plan = plan_step(lengths, ranks, CostModel(capacity))
    slices = [piece for pack in plan.packs for piece in pack.slices]
    assert sorted((s.document, s.start, s.stop) for s in slices) == [(d, 0, length) for d, length in enumerate(lengths)]
    assert all(pack.tokens <= capacity and pack.degree == 1 for pack in plan.packs)
    assert sum(len(plan.packs_of(rank)) for rank in range(ranks)) == len(plan.packs)


@given(lengths=STEPS, ranks=st.integers(1, 8), capacity=st.integers(40, 100))
def test_loads_differ_by_less_than_the_largest_pack(lengths: list[int], ranks: int, capacity: int) -> None:
    plan = plan_step(lengths, ranks, CostModel(capacity))
    loads = [sum(pack.tokens for pack in plan.packs_of(rank)) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(pack.tokens for pack in plan.packs)


@given(lengths=STEPS, capacity=st.integers(40, 100))
def test_packs_do_not_depend_on_the_number_of_ranks(lengths: list[int], capacity: int) -> None:
    """So that a change of the grid changes where a pack is computed and not what is in it."""
    plans = [plan_step(lengths, ranks, CostModel(capacity)) for ranks in (1, 3, 8)]
    assert len({tuple(pack.slices for pack in plan.packs) for plan in plans}) == 1


def test_an_empty_step_has_an_empty_plan() -> None:
    assert plan_step([], 3, CostModel(10)).packs == ()


def test_more_ranks_than_packs_leave_some_without_work() -> None:
    assert [len(plan_step([5, 5], 4, CostModel(10)).packs_of(rank)) for rank in range(4)] == [1, 0, 0, 0]


def test_a_document_that_fits_no_pack_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"document 1 has 11 tokens; a pack holds 10 \(planning\.tokens_per_pack\)"):
        plan_step([5, 11], 2, CostModel(10))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"planning\.policy is 'guess'; accepted: data_parallel"):
        plan_step([5], 2, CostModel(10), policy="guess")


def test_planning_needs_only_numpy() -> None:
    code = "import sys, megatron_ext.planning; print({'torch', 'pydantic', 'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
