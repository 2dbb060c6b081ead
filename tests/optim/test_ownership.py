import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.optim.ownership import OwnedRows, assign_rows

SHAPES = st.lists(
    st.one_of(st.tuples(), st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 12))), min_size=1, max_size=8
)


def row_size(shape: torch.Size) -> int:
    return shape.numel() // (shape[0] if shape else 1)


@given(shapes=SHAPES, ranks=st.integers(1, 9))
def test_every_row_has_one_owner_and_shares_are_even(shapes: list[tuple[int, ...]], ranks: int) -> None:
    named = {str(number): torch.Size(shape) for number, shape in enumerate(shapes)}
    owned = assign_rows(named, ranks)
    assert [entry.name for entry in owned] == sorted((entry.name for entry in owned), key=int)
    for name, shape in named.items():
        entries = [entry for entry in owned if entry.name == name]
        assert [row for entry in entries for row in range(entry.start, entry.stop)] == list(range(shape[0] if shape else 1))
    assert [entry.owner for entry in owned] == sorted(entry.owner for entry in owned), "stretches are contiguous"
    loads = [sum(row_size(named[e.name]) * (e.stop - e.start) for e in owned if e.owner == rank) for rank in range(ranks)]
    total = sum(shape.numel() for shape in named.values())
    longest_row = max(row_size(shape) for shape in named.values())
    assert sum(loads) == total
    assert all(abs(load - total / ranks) < longest_row + 1e-9 for load in loads)


def test_a_small_case_by_hand() -> None:
    shapes = {"a": torch.Size([4, 2]), "b": torch.Size([3]), "c": torch.Size([])}
    assert assign_rows(shapes, 2) == [OwnedRows("a", 0, 3, 0), OwnedRows("a", 3, 4, 1), OwnedRows("b", 0, 3, 1), OwnedRows("c", 0, 1, 1)]
    assert assign_rows(shapes, 1) == [OwnedRows("a", 0, 4, 0), OwnedRows("b", 0, 3, 0), OwnedRows("c", 0, 1, 0)]


def test_a_large_embedding_does_not_sit_on_one_rank() -> None:
    owned = assign_rows({"embedding": torch.Size([1000, 64]), "norm": torch.Size([64])}, 4)
    assert [(entry.owner, entry.stop - entry.start) for entry in owned if entry.name == "embedding"] == [
        (0, 251),
        (1, 250),
        (2, 250),
        (3, 249),
    ]
