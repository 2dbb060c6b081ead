import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.planning import CostModel, Slice, plan_step
from megatron_ext.planning.splitting import in_documents, split_documents


def test_only_long_documents_are_cut_into_equal_parts() -> None:
    assert split_documents([3, 10, 11], 5) == [
        Slice(0, 0, 3),
        Slice(1, 0, 5),
        Slice(1, 5, 10),
        Slice(2, 0, 3),
        Slice(2, 3, 7),
        Slice(2, 7, 11),
    ]


@given(lengths=st.lists(st.integers(1, 100), max_size=20), most=st.integers(1, 40))
def test_parts_cover_every_token_once_and_fit(lengths: list[int], most: int) -> None:
    parts = split_documents(lengths, most)
    plan = in_documents(plan_step([len(part) for part in parts], 2, CostModel(most), "data_parallel"), parts)
    plan.validate(lengths, most)
    assert all(len(part) <= most for part in parts)
    assert len(parts) == pytest.approx(sum(-(-length // most) for length in lengths))
