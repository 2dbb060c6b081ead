import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.parallel.placement import box_shape, intersection, slices, whole_box
from megatron_ext.parallel.split import even_split, head_split


@given(total=st.integers(0, 100), size=st.integers(1, 9))
def test_an_even_split_covers_everything_once_and_differs_by_one(total: int, size: int) -> None:
    parts = [even_split(total, rank, size) for rank in range(size)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
    assert max(part.size for part in parts) - min(part.size for part in parts) <= 1


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [
        (4, 2, [(0, 12, 1), (12, 24, 1)]),
        (2, 4, [(0, 6, 2), (0, 6, 2), (6, 12, 2), (6, 12, 2)]),
        (1, 3, [(0, 6, 3)] * 3),
    ],
)
def test_heads_stay_whole_and_are_copied_where_they_are_fewer(heads: int, size: int, expected: list[tuple[int, int, int]]) -> None:
    parts = [head_split(heads, 6, rank, size) for rank in range(size)]
    assert [(part.start, part.stop, part.copies) for part in parts] == expected
    assert all(part.total == 6 * heads for part in parts)


def test_boxes() -> None:
    one, other = ((0, 4), (2, 6)), ((3, 9), (0, 3))
    assert intersection(one, other) == ((3, 4), (2, 3))
    assert intersection(one, ((4, 5), (2, 6))) is None
    assert intersection((), ()) == ()
    assert slices(((3, 4), (2, 3)), one) == (slice(3, 4), slice(0, 1))
    assert box_shape(one) == (4, 4) and whole_box(box_shape(one)) == ((0, 4), (0, 4))
