"""Gradients leave in one order, while backward runs, and are let go."""

import pytest
import torch

from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import owner_optimizer

LAYERS, WIDTH, PASSES = 4, 8, 3


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def rule(owned: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return AdamW([tensor for _, tensor in owned], lr=0.01)


def steps(world: World, overlap: bool, passes_by_rank: tuple[int, ...]) -> tuple[list[torch.Tensor], list[tuple[int, int]], list[int]]:
    """Parameters after two steps; how many backward passes had begun at each reduction, and its owner; gradients left after each pass."""
    model = network()
    optimizer: ShardedOptimizer = owner_optimizer(model.named_parameters(), rule, world, overlap=overlap)
    sent: list[tuple[int, int]] = []
    kept: list[int] = []
    begun = 0
    original = Group.start_reduce

    def spy(group: Group, tensor: torch.Tensor, owner: int) -> object:
        sent.append((begun, owner))
        return original(group, tensor, owner)

    Group.start_reduce = spy
    try:
        for step in range(2):
            passes = passes_by_rank[world.rank]
            optimizer.expect_backwards(passes)
            for number in range(passes):
                begun = number + 1
                x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * world.rank + number))
                model(x).square().mean().backward()
                kept.append(sum(parameter.grad is not None for parameter in model.parameters()))
            begun = -1
            optimizer.step()
    finally:
        Group.start_reduce = original
    return [parameter.detach() for parameter in model.parameters()], sent, kept


@pytest.mark.parametrize("passes", [(PASSES, PASSES), (PASSES, 1), (PASSES, 0)])
def test_overlap_changes_when_and_not_what(run_ranks: RunRanks, passes: tuple[int, int]) -> None:
    with_overlap, without = (run_ranks(2, steps, overlap, passes) for overlap in (True, False))
    for rank in range(2):
        (seen, sent, kept), (expected, later, all_kept) = with_overlap[rank], without[rank]
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert [owner for _, owner in sent] == [owner for _, owner in later] == [owner for _, owner in with_overlap[0][1]]
        assert {when for when, _ in later} == {-1}, "without overlap nothing leaves before the step"
        if passes[rank]:
            assert {when for when, _ in sent} == {passes[rank]}, "all leave in the last backward pass, none before"
            assert kept[passes[rank] - 1] == 0 and all(count == LAYERS for count in all_kept), "what has left is let go"
        else:
            assert {when for when, _ in sent} == {-1}


class Halving(UpdateExtension):
    """Drops a gradient's first row, and takes half of every update."""

    needs_whole = needs_before = True

    def __init__(self) -> None:
        self.shapes: dict[str, torch.Size] = {}

    def on_gradient(self, part: OwnedBox, gradient: torch.Tensor) -> None:
        self.shapes[part.name] = gradient.shape
        gradient[0] = 0.0

    def on_update(self, part: OwnedBox, master: torch.Tensor, state: dict[str, torch.Tensor], before: torch.Tensor | None) -> None:
        assert before is not None, "it was asked for"
        master.copy_(before + 0.5 * (master - before))


def extended(world: World) -> tuple[list[torch.Tensor], dict[str, torch.Size]]:
    model, halving = network().double(), Halving()
    optimizer = owner_optimizer(model.named_parameters(), rule, world, clip_norm=0.1, extensions=[halving])
    for _ in range(3):
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        model(x.chunk(world.size)[world.rank]).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], halving.shapes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_extensions_see_whole_tensors_before_and_after_the_rule(run_ranks: RunRanks, size: int) -> None:
    model = network().double()
    plain = rule(list(model.named_parameters()))
    for _ in range(3):
        plain.zero_grad()
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        model(x).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad[0] = 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        plain.step()
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old + 0.5 * (parameter - old))
    results = run_ranks(size, extended)
    seen = [shape for _, shapes in results for shape in shapes.values()]
    assert seen == [torch.Size([WIDTH, WIDTH])] * LAYERS, "each whole, and each by one owner"
    for parameters, _ in results:
        for found, expected in zip(parameters, model.parameters(), strict=True):
            assert (found - expected).abs().max() < 1e-12
