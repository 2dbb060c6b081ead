"""Losses against a teacher: those of torch and their gradients, in chunks, over divided vocabularies, attached anywhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.model.distillation import attach_loss, hidden_distance, linear_kl_divergence
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.split import even_split
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

VOCAB, TOKENS = 29, 50


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and matrix, the teacher's of another width, and weights of tokens of which some are 0."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((TOKENS, 6), (VOCAB, 6), (TOKENS, 9), (VOCAB, 9))]
    weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    return *drawn, weight * (torch.arange(TOKENS) % 5 > 0)


def by_torch() -> tuple[Tensor, list[Tensor], Tensor]:
    """Sum, gradients of the student's tensors, and divergences of the tokens with weight."""
    hidden, matrix, theirs, their_matrix, weight = tensors()
    hidden.requires_grad_(), matrix.requires_grad_()
    ours, target = F.log_softmax(hidden @ matrix.T, 1), F.log_softmax(theirs @ their_matrix.T, 1)
    divergence = F.kl_div(ours, target, reduction="none", log_target=True).sum(1)
    total = divergence @ weight
    return total.detach(), list(torch.autograd.grad(3.0 * total, (hidden, matrix))), divergence.detach() * (weight > 0)


@pytest.mark.parametrize("tile", [None, 7, 1])
def test_divergence_is_that_of_torch_in_tiles(tile: int | None) -> None:
    hidden, matrix, theirs, their_matrix, weight = tensors()
    hidden.requires_grad_(), matrix.requires_grad_()
    total, divergence = linear_kl_divergence((hidden, matrix), (theirs, their_matrix), weight, tile=tile)
    found = torch.autograd.grad(3.0 * total, (hidden, matrix))
    expected, gradients, divergences = by_torch()
    torch.testing.assert_close([total.detach(), *found, divergence], [expected, *gradients, divergences], rtol=1e-12, atol=1e-13)


def divided(world: World) -> dict[str, Any]:
    """The divergence with the vocabulary divided over the ranks."""
    grid = Grid(world, GridShape(1, 1, world.size))
    rows = even_split(VOCAB, world.rank, world.size)
    hidden, matrix, theirs, their_matrix, weight = tensors()
    hidden.requires_grad_()
    mine = matrix[rows.start : rows.stop].requires_grad_()
    total, divergence = linear_kl_divergence((hidden, mine), (theirs, their_matrix[rows.start : rows.stop]), weight, rows, grid.tp)
    gradients = torch.autograd.grad(3.0 * total, (hidden, mine))
    return {"total": total.detach(), "divergence": divergence, "hidden": gradients[0], "matrix": gradients[1]}


@pytest.mark.parametrize("ranks", [2, 3])
def test_divergence_of_a_divided_vocabulary_is_the_same(run_ranks: RunRanks, ranks: int) -> None:
    results = run_ranks(ranks, divided)
    expected, gradients, divergences = by_torch()
    whole = [sum(result["hidden"] for result in results), torch.cat([result["matrix"] for result in results])]
    torch.testing.assert_close(whole, gradients, rtol=1e-12, atol=1e-13)
    for result in results:
        torch.testing.assert_close([result["total"], result["divergence"]], [expected, divergences], rtol=1e-12, atol=1e-13)


def test_a_model_has_no_divergence_from_itself() -> None:
    hidden, matrix, *_, weight = tensors()
    hidden.requires_grad_()
    total, divergence = linear_kl_divergence((hidden, matrix), (hidden.detach(), matrix), weight)
    assert divergence.abs().max() < 1e-14
    assert torch.autograd.grad(total, hidden)[0].abs().max() < 1e-14


def test_no_token_counts_nothing() -> None:
    hidden, matrix, theirs, their_matrix, weight = (each[:0] if len(each) == TOKENS else each for each in tensors())
    total, divergence = linear_kl_divergence((hidden.requires_grad_(), matrix), (theirs, their_matrix), weight)
    total.backward()
    assert total == 0 and divergence.shape == (0,)


def test_distances_are_what_their_names_say() -> None:
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert hidden_distance(x, y, "mse").tolist() == [1.0, 4.5]
    assert hidden_distance(x, y, "cosine").tolist() == pytest.approx([1 - 24 / 25, 2.0])
    assert hidden_distance(x.bfloat16(), y.bfloat16(), "mse").dtype == torch.float32


def test_an_attached_loss_joins_what_backward_begins_with() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = x * 1.0
    passed = attach_loss(y, (y**2).sum())
    assert torch.equal(passed, y)
    (5.0 * passed).sum().backward()
    assert x.grad.tolist() == [5.0 + 2.0, 5.0 + 4.0]
