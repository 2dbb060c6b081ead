from collections.abc import Iterable
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.optim.ownership import OwnedBox, assign, assign_rows, assign_whole, buckets
from megatron_ext.optim.rules import Rule
from megatron_ext.parallel.placement import Placement, box_shape, whole_box

SHAPES = st.lists(
    st.one_of(st.tuples(), st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 12))), min_size=1, max_size=8
)


def row_size(shape: torch.Size) -> int:
    return shape.numel() // (shape[0] if shape else 1)


@given(shapes=SHAPES, ranks=st.integers(1, 9))
def test_every_row_has_one_owner_and_shares_are_even(shapes: list[tuple[int, ...]], ranks: int) -> None:
    named = {str(number): torch.Size(shape) for number, shape in enumerate(shapes)}
    owned = assign_rows({name: whole_box(shape) for name, shape in named.items()}, ranks)
    assert [entry.name for entry in owned] == sorted((entry.name for entry in owned), key=int)
    for name, shape in named.items():
        entries = [entry for entry in owned if entry.name == name]
        rows = [row for entry in entries for row in range(*(entry.box[0] if entry.box else (0, 1)))]
        assert rows == list(range(shape[0] if shape else 1))
        assert all(entry.box[1:] == whole_box(shape)[1:] for entry in entries)
    assert [entry.owner for entry in owned] == sorted(entry.owner for entry in owned), "stretches are contiguous"
    loads = [sum(box_shape(entry.box).numel() for entry in owned if entry.owner == rank) for rank in range(ranks)]
    total = sum(shape.numel() for shape in named.values())
    longest_row = max(row_size(shape) for shape in named.values())
    assert sum(loads) == total
    assert all(abs(load - total / ranks) < longest_row + 1e-9 for load in loads)


def test_a_small_case_by_hand() -> None:
    boxes = {"a": ((0, 4), (0, 2)), "b": ((0, 3),), "c": ()}
    assert assign_rows(boxes, 2) == [
        OwnedBox("a", ((0, 3), (0, 2)), 0),
        OwnedBox("a", ((3, 4), (0, 2)), 1),
        OwnedBox("b", ((0, 3),), 1),
        OwnedBox("c", (), 1),
    ]
    assert assign_rows(boxes, 1) == [OwnedBox(name, box, 0) for name, box in boxes.items()]


def test_parts_of_a_divided_parameter_keep_the_coordinates_of_the_whole() -> None:
    assert assign_rows({"rows": ((8, 12), (0, 3)), "columns": ((0, 4), (3, 6))}, 2) == [
        OwnedBox("rows", ((8, 12), (0, 3)), 0),
        OwnedBox("columns", ((0, 4), (3, 6)), 1),
    ]
    assert assign_rows({"rows": ((8, 12), (0, 3))}, 2) == [OwnedBox("rows", ((8, 10), (0, 3)), 0), OwnedBox("rows", ((10, 12), (0, 3)), 1)]


def test_a_large_embedding_does_not_sit_on_one_rank() -> None:
    owned = assign_rows({"embedding": ((0, 1000), (0, 64)), "norm": ((0, 64),)}, 4)
    assert [(entry.owner, box_shape(entry.box)[0]) for entry in owned if entry.name == "embedding"] == [
        (0, 251),
        (1, 250),
        (2, 250),
        (3, 249),
    ]


def rules_of(names: Iterable[str], share: str) -> dict[str, Rule]:
    return dict.fromkeys(names, Rule("adamw", lambda named: torch.optim.SGD([tensor for _, tensor in named]), share))


def alone(shape: tuple[int, ...]) -> Placement:
    return Placement(torch.Size(shape), whole_box(torch.Size(shape)), (0,), False)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), ranks=st.integers(1, 6), tensor_ranks=st.integers(1, 3))
def test_whole_parameters_are_balanced_as_well_as_the_largest_allows(sizes: list[int], ranks: int, tensor_ranks: int) -> None:
    held = {str(number): alone((size, 2)) for number, size in enumerate(sizes)}
    owned = assign_whole(held, rules_of(held, "whole"), ranks, tensor_ranks)
    assert [(entry.name, entry.box) for entry in owned] == [(name, placement.box) for name, placement in held.items()]
    slots = [(owner, t if tensor_ranks > 1 else None) for owner in range(ranks) for t in range(tensor_ranks)]
    loads = [sum(size for size, e in zip(sizes, owned, strict=True) if (e.owner, e.meets_on) == slot) for slot in slots]
    assert sum(loads) == sum(sizes)
    # Longest processing time first is within 4/3 of the best (Graham 1969), which is at least the mean and the largest.
    assert max(loads) <= 4 / 3 * max(
        max(sizes), sum(sizes) / len(slots), *(sum(pair) for pair in [sorted(sizes)[-len(slots) - 1 :][:2]] if len(sizes) > len(slots))
    )


def test_cost_and_not_size_decides_about_whole_parameters() -> None:
    """Orthogonalizing 64 x 64 costs as much as 16 x 1024, whose elements are four times as many."""
    held = {"square": alone((64, 64)), "wide": alone((16, 1024)), "small": alone((32, 64)), "tiny": alone((32, 64))}
    matrix = Rule(
        "muon", lambda named: torch.optim.SGD([tensor for _, tensor in named]), "whole", cost=lambda shape: prod(shape) * min(shape)
    )
    owners = {part.name: part.owner for part in assign_whole(held, dict.fromkeys(held, matrix), 2)}
    assert owners["square"] != owners["wide"] and owners["small"] != owners["tiny"]
    by_size = {part.name: part.owner for part in assign_whole(held, rules_of(held, "whole"), 2)}
    assert by_size["square"] == by_size["small"] == by_size["tiny"] != by_size["wide"]


@pytest.mark.parametrize("share", ["rows", "part", "whole"])
def test_holders_of_the_same_part_find_the_same_owners_whatever_else_they_hold(share: str) -> None:
    def shared(replicas: tuple[int, ...], rows: int) -> Placement:
        return Placement(torch.Size([rows, 3]), ((0, rows), (0, 3)), replicas, True)

    first = {"embedding": shared((0, 6), 40), "a": shared((0,), 17), "norm": shared((0, 1), 9)}
    last = {"b": shared((6,), 5), "c": shared((6,), 90), "embedding": shared((0, 6), 40), "norm": shared((6, 7), 9)}
    owned = [[part for part in assign(held, rules_of(held, share), 3, 2) if part.name == "embedding"] for held in (first, last)]
    assert owned[0] == owned[1] and owned[0]
    for held in (first, last):
        parts = assign(held, rules_of(held, share), 3, 2)
        assert sum(box_shape(part.box).numel() for part in parts) == sum(box_shape(p.box).numel() for p in held.values())
        assert list(dict.fromkeys(part.name for part in parts)) == list(held)


def test_buckets_hold_parts_of_one_owner_and_dtype_and_are_complete_in_their_order() -> None:
    owned = [OwnedBox(name, ((0, 10),), owner) for name, owner in zip("abcdef", (0, 1, 0, 0, 1, 1), strict=True)]
    dtypes = {name: torch.float64 if name == "f" else torch.float32 for name in "abcdef"}
    found = [[part.name for part in bucket] for bucket in buckets(owned, dtypes, bucket_bytes=80)]
    assert found == [["c", "d"], ["f"], ["b", "e"], ["a"]], "from the end of the model; what is not full leaves last"
