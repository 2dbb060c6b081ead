import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, Pack, Plan, Slice, plan_step

GOOD = Plan(4, (Pack(0, 2, (Slice(0, 0, 15), Slice(1, 0, 5))), Pack(2, 1, (Slice(1, 5, 9),)), Pack(3, 1, ())))
LENGTHS = [15, 9]


def test_packs_know_their_tokens_and_ranks() -> None:
    assert [pack.tokens for pack in GOOD.packs] == [20, 4, 0]
    assert list(GOOD.packs[0].ranks) == [0, 1]
    assert [len(GOOD.packs_of(rank)) for rank in range(4)] == [1, 1, 1, 1]
    assert GOOD.packs_of(1) == [GOOD.packs[0]]
    assert GOOD.fill(10) == pytest.approx(24 / 40)
    assert Plan(2, ()).fill(10) == 1.0


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), ranks=st.integers(1, 8))
def test_encoding_is_lossless(lengths: list[int], ranks: int) -> None:
    plan = plan_step(lengths, ranks, CostModel(50))
    encoded = plan.encode()
    assert encoded.dtype == np.int32 and encoded.ndim == 1
    assert Plan.decode(encoded) == plan


def test_encoding_keeps_blocks_and_parts_of_documents() -> None:
    assert Plan.decode(GOOD.encode()) == GOOD
    GOOD.validate(LENGTHS, tokens_per_pack=10)


@pytest.mark.parametrize(
    "encoded",
    [
        [],
        [1, 2],
        [1, 4, 0, 0],
        [[2, 4, 0, 0]],
        [2, 4, 0, 1],
        [2, 4, 0, -1],
        [2, 4, 0, 1, 0, 1, 1, 2, 0, 0, 5],
        [2, 4, 0, 1, 0, 1, 1, -1],
        [2, 4, 0, 0, 7],
        [2, 4, 0, 1, 0, 1, 1, 1, 0, 0, 5, 9],
    ],
)
def test_what_is_no_plan_is_refused(encoded: list[int]) -> None:
    with pytest.raises(ConfigError, match="encoded plan"):
        Plan.decode(np.array(encoded, dtype=np.int32))


@pytest.mark.parametrize(
    ("packs", "message"),
    [
        ([Pack(0, 2, (Slice(0, 0, 15), Slice(1, 0, 9)))], "pack 0 has 24 tokens; 2 ranks hold 20"),
        ([Pack(0, 2, (Slice(0, 0, 15),))], "document 1: 0 of 9 tokens are computed"),
        ([Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(1, 0, 8),))], "document 1: 8 of 9 tokens are computed"),
        (
            [Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(1, 0, 9),)), Pack(3, 1, (Slice(1, 0, 9),))],
            "document 1: tokens 0 to 9 are not",
        ),
        ([Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(1, 0, 4), Slice(1, 5, 9)))], "document 1: tokens 4 to 5 are not"),
        ([Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(2, 0, 9),))], "pack 1 names document 2; the step has 2"),
        ([Pack(1, 2, ())], "pack 0: ranks 1 to 2 are not an aligned power-of-two block of 4"),
        ([Pack(0, 3, ())], "ranks 0 to 2 are not"),
        ([Pack(0, 0, ())], "are not an aligned"),
        ([Pack(4, 1, ())], "ranks 4 to 4 are not"),
        ([Pack(0, 8, ())], "ranks 0 to 7 are not"),
        ([Pack(-1, 1, ())], "are not an aligned"),
        ([Pack(0, 4, (), 3)], "pack 0: a ring of 3 does not divide 4 ranks"),
        ([Pack(0, 4, (), 0)], "pack 0: a ring of 0"),
        ([Pack(0, 4, ()), Pack(0, 1, (Slice(0, 0, 11),)), Pack(1, 2, ())], "pack 1 has 11 tokens"),
        ([Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(-1, 0, 9),))], "pack 1 names document -1"),
        ([Pack(0, 2, (Slice(0, 0, 15),)), Pack(2, 1, (Slice(1, 0, 5), Slice(1, 5, 5), Slice(1, 5, 9)))], "document 1: tokens 5 to 5"),
    ],
)
def test_a_wrong_plan_names_what_is_wrong(packs: list[Pack], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(4, tuple(packs)).validate(LENGTHS, tokens_per_pack=10)


@pytest.mark.parametrize(
    ("packs", "message"),
    [
        ([Pack(0, 2, ()), Pack(2, 1, ())], "rank 3 has no pack in round 0"),
        ([Pack(0, 2, ()), Pack(0, 4, ())], "pack 1: its ranks are not all in round 0"),
        ([Pack(0, 2, ()), Pack(0, 2, ()), Pack(2, 2, ()), Pack(2, 2, ())], "pack 1: its ranks are not all in round 0"),
    ],
)
def test_a_plan_that_is_not_in_rounds_is_refused(packs: list[Pack], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(4, tuple(packs), in_rounds=True).validate([], tokens_per_pack=10)


BLOCKS = st.lists(st.tuples(st.integers(0, 7), st.sampled_from([1, 2, 4])), max_size=20)


@given(blocks=BLOCKS, at_least=st.integers(0, 3))
def test_in_rounds_every_rank_has_as_many_packs_and_a_block_meets(blocks: list[tuple[int, int]], at_least: int) -> None:
    packs = tuple(Pack(rank // degree * degree, degree, (Slice(number, 0, 1),)) for number, (rank, degree) in enumerate(blocks))
    plan = Plan(8, packs)
    by_rounds = plan.by_rounds(at_least)
    by_rounds.validate([1] * len(packs), tokens_per_pack=1)
    assert by_rounds.by_rounds(at_least) is by_rounds
    rounds = [by_rounds.packs_of(rank) for rank in range(8)]
    assert len({len(each) for each in rounds}) == 1 and len(rounds[0]) >= at_least
    for rank, each in enumerate(rounds):
        assert [pack for pack in each if pack.slices] == plan.packs_of(rank), "the same packs in the same order"
        assert all(pack == Pack(rank, 1, ()) for pack in each if not pack.slices), "those without work have no tokens"
    for pack in packs:
        assert len({rounds[rank].index(pack) for rank in pack.ranks}) == 1, "all ranks of a block come to it in the same round"
