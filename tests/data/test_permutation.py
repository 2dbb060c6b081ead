import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.permutation import Permutation


@given(size=st.integers(1, 300), seed=st.text(max_size=5))
def test_every_item_once(size: int, seed: str) -> None:
    assert sorted(Permutation(size, seed)[i] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4097])
def test_every_item_once_around_powers_of_two(size: int) -> None:
    order = Permutation(size, "seed")
    assert len(order) == size
    assert sorted(order[i] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("position", [-1, 7])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position} of a permutation of 7"):
        Permutation(7, "seed")[position]


def test_random_access_needs_no_memory_at_any_size() -> None:
    size = 10**12
    order = Permutation(size, "seed")
    values = [order[i] for i in (0, 1, size // 2, size - 1)]
    assert len(set(values)) == 4 and all(0 <= value < size for value in values)


def test_looks_shuffled() -> None:
    """Means of the first items, fixed points and rising neighbours are those of a random order, to four standard deviations."""
    size, seeds = 1000, 200
    orders = [[Permutation(size, str(seed))[i] for i in range(size)] for seed in range(seeds)]
    first = sum(order[0] for order in orders) / seeds
    assert abs(first - size / 2) < 4 * size / (12 * seeds) ** 0.5
    fixed = sum(sum(value == i for i, value in enumerate(order)) for order in orders)
    assert abs(fixed - seeds) < 4 * seeds**0.5
    rising = sum(sum(a < b for a, b in pairwise(order)) for order in orders)
    expected = seeds * (size - 1) / 2
    assert abs(rising - expected) < 4 * (seeds * (size + 1) / 12) ** 0.5
    assert len({tuple(order) for order in orders}) == seeds


def test_is_the_same_in_every_process() -> None:
    code = "from megatron_ext.data.permutation import Permutation as P; print([P(50, '7/prose/0')[i] for i in range(50)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "12345"})
    assert done.stdout.strip() == str([Permutation(50, "7/prose/0")[i] for i in range(50)])
