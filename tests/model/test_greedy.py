"""The likeliest token, as torch's argmax has it, with the vocabulary on one rank and on several."""

import pytest
import torch

from megatron_ext.model.greedy import is_likeliest
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.split import even_split
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

VOCAB = 37


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers, so that many largest logits are shared by several tokens; labels that are right, others' equals and wrong."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (3000, 6), generator=generator).double()
    weight = torch.randint(-1, 2, (VOCAB, 6), generator=generator).double()
    labels = torch.randint(VOCAB, (3000,), generator=generator)
    labels[::3] = (hidden @ weight.T).argmax(1)[::3]
    labels[1::3] = VOCAB - 1 - (hidden @ weight.T).flip(1).argmax(1)[1::3]
    return hidden, weight, labels


def test_it_is_the_argmax_and_the_first_of_equals() -> None:
    hidden, weight, labels = case()
    logits = hidden @ weight.T
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    found = is_likeliest(hidden, weight, labels)
    assert torch.equal(found, labels == first) and found[::3].all()
    equals = (logits.gather(1, labels[:, None])[:, 0] == logits.amax(1)) & ~found
    assert equals.sum() > 100 and 0.35 < found.double().mean() < 0.9
    assert is_likeliest(hidden[:0], weight, labels[:0]).tolist() == []


def found_on(world: World) -> torch.Tensor:
    hidden, weight, labels = case()
    rows, group = even_split(VOCAB, world.rank, world.size), Grid(world, GridShape(1, 1, world.size)).tp
    return is_likeliest(hidden, weight[rows.start : rows.stop], labels, rows, group)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_divide_the_vocabulary_find_the_same(run_ranks: RunRanks, ranks: int) -> None:
    expected = is_likeliest(*case())
    assert all(torch.equal(found, expected) for found in run_ranks(ranks, found_on))
