from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.parallel.pipeline import Stage, balanced, stages, whole_model


def worst(counts: tuple[int, ...] | list[int], block: float, first: float, last: float) -> float:
    loads = [count * block for count in counts]
    loads[0] += first
    loads[-1] += last
    return max(loads)


@given(layers=st.integers(1, 9), size=st.integers(1, 4), block=st.integers(1, 5), first=st.integers(0, 20), last=st.integers(0, 20))
def test_no_division_has_a_less_costly_worst_stage(layers: int, size: int, block: int, first: int, last: int) -> None:
    counts = balanced(layers, size, block, first, last)
    assert sum(counts) == layers and len(counts) == size
    every = [each for each in product(range(layers + 1), repeat=size) if sum(each) == layers]
    assert worst(counts, block, first, last) == min(worst(each, block, first, last) for each in every)


def test_a_heavy_head_gets_fewer_blocks() -> None:
    assert balanced(8, 2, 1.0, 0.0, 4.0) == [6, 2]
    assert balanced(8, 4, 1.0, 0.0, 0.0) == [2, 2, 2, 2]


def test_stages_follow_one_another() -> None:
    assert stages([2, 0, 1]) == [Stage(range(0, 2), True, False), Stage(range(2, 2), False, False), Stage(range(2, 3), False, True)]
    assert stages([3]) == [whole_model(3)] == [Stage(range(3), True, True)]
