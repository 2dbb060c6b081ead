"""Which tokens of a pack each rank of its block computes."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.planning import Pack, Slice

BLOCKS = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4)]


def tokens_of(slices: tuple[Slice, ...]) -> list[tuple[int, int]]:
    return [(part.document, token) for part in slices for token in range(part.start, part.stop)]


@given(lengths=st.lists(st.integers(0, 40), max_size=6), block=st.sampled_from(BLOCKS))
def test_every_token_is_with_one_rank_and_neighbours_have_equally_many(lengths: list[int], block: tuple[int, int]) -> None:
    degree, ring = block
    pack = Pack(0, degree, tuple(Slice(number, 3, 3 + length) for number, length in enumerate(lengths)), ring)
    shards = [pack.shard(place) for place in range(degree)]
    seen = [tokens_of(shard.slices) for shard in shards]
    assert sorted(token for part in seen for token in part) == tokens_of(pack.slices)
    neighbours = degree // ring
    for place, (shard, part) in enumerate(zip(shards, seen, strict=True)):
        assert len(part) == shard.tokens[place % neighbours], "what the rank says of itself"
        assert max(shard.tokens) - min(shard.tokens) <= 1
        assert shard.tokens == shards[place - place % neighbours].tokens, "neighbours agree"


@given(lengths=st.lists(st.integers(0, 40), max_size=6), block=st.sampled_from([b for b in BLOCKS if b[1] > 1]))
def test_around_a_ring_documents_lie_in_a_zig_zag(lengths: list[int], block: tuple[int, int]) -> None:
    degree, ring = block
    pack = Pack(0, degree, tuple(Slice(number, 0, length) for number, length in enumerate(lengths)), ring)
    neighbours = degree // ring
    for j in range(ring):
        shards = [pack.shard(j * neighbours + place) for place in range(neighbours)]
        mine = [token for shard in shards for token in tokens_of(shard.slices)]
        expected = []
        for number, sizes in enumerate(shards[0].chunks):
            assert len(sizes) == 2 * ring and sum(sizes) == lengths[number]
            assert max(sizes) - min(sizes) <= 1, "equal chunks see equally many keys around the ring"
            for chunk in (j, 2 * ring - 1 - j):
                start = sum(sizes[:chunk])
                expected += [(number, token) for token in range(start, start + sizes[chunk])]
        assert mine == expected


def test_without_a_ring_ranks_have_the_tokens_in_order() -> None:
    pack = Pack(4, 4, (Slice(0, 0, 3), Slice(2, 5, 11)))
    shards = [pack.shard(place) for place in range(4)]
    assert [shard.tokens for shard in shards] == [(3, 2, 2, 2)] * 4 and not shards[0].chunks
    assert [shard.slices for shard in shards] == [(Slice(0, 0, 3),), (Slice(2, 5, 7),), (Slice(2, 7, 9),), (Slice(2, 9, 11),)]
