import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.planning.packing import best_fit_decreasing


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every pack for every document."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [(capacity - sum(lengths[i] for i in pack), number) for number, pack in enumerate(packs)]
        fitting = [entry for entry in free if entry[0] >= lengths[index]]
        if fitting:
            packs[min(fitting)[1]].append(index)
        else:
            packs.append([index])
    return packs


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    packs = best_fit_decreasing(lengths, capacity)
    assert packs == by_definition(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_no_two_packs_could_have_been_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[i] for i in pack) for pack in best_fit_decreasing(lengths, 100))
    assert len(loads) == 1 or loads[0] + loads[1] > 100


def test_a_case_by_hand() -> None:
    assert best_fit_decreasing([6, 3, 5, 4, 2], 10) == [[0, 3], [2, 1, 4]]
    assert best_fit_decreasing([], 10) == []


def test_a_document_longer_than_the_capacity_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="cut to the capacity"):
        best_fit_decreasing([11], 10)
