"""The regions of tensor parallelism: what they compute, and what they send by their formulas."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.loss import linear_cross_entropy
from megatron_ext.model.placements import parameter_boxes
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.placement import slices, whole_box
from megatron_ext.parallel.tensor import TensorParallel, VocabularyEmbedding, single
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

MODEL = ModelConfig(51, 24, 48, 2, 4, 2, 6, 64, init_std=0.2)
LABELLED = 9


def group_of(world: World) -> TensorParallel:
    return TensorParallel(Grid(world, GridShape(1, 1, world.size)).tp)


def vocabulary_parallel_loss(world: World, vocab: int, tokens: int) -> tuple[float, float, float]:
    """Largest error of losses, of the gradient of hidden states and of this rank's rows, against torch on whole logits."""
    tp = group_of(world)
    generator = torch.Generator().manual_seed(vocab)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    loss_weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    rows = tp.rows(vocab)
    x, part = hidden.clone().requires_grad_(), weight[rows.start : rows.stop].clone().requires_grad_()
    total, losses = linear_cross_entropy(tp.enter(x, tokens), part, labels, loss_weight, rows, tp.group)
    total.backward()
    y, whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.cross_entropy(y @ whole.T, labels, reduction="none")
    (expected * loss_weight).sum().backward()
    errors = (losses - expected, x.grad - y.grad, part.grad - whole.grad[rows.start : rows.stop])
    return tuple(float(error.abs().max()) if error.numel() else 0.0 for error in errors)


@pytest.mark.parametrize("size", [2, 3])
def test_loss_over_a_divided_vocabulary_is_that_of_torch(run_ranks: RunRanks, size: int) -> None:
    for vocab, tokens in ((51, 17), (4, 1), (64, 300)):
        for errors in run_ranks(size, vocabulary_parallel_loss, vocab, tokens):
            assert max(errors) < 1e-12


def embedded(world: World) -> float:
    tp = group_of(world)
    weight = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([0, 10, 5, 5, 3])
    part = VocabularyEmbedding(tp.rows(11), 3).double()
    with torch.no_grad():
        part.weight.copy_(weight[part.split.start : part.split.stop])
    out = tp.leave(part(tokens))
    out.square().sum().backward()
    whole = weight.clone().requires_grad_()
    F.embedding(tokens, whole).square().sum().backward()
    error = (part.weight.grad - whole.grad[part.split.start : part.split.stop]).abs().max()
    return float(max(error, (out - weight[tokens]).abs().max()))


def test_embedding_of_a_divided_vocabulary(run_ranks: RunRanks) -> None:
    assert max(run_ranks(3, embedded)) == 0.0


def test_alone_nothing_is_copied() -> None:
    x = torch.ones(3, 2)
    assert single().enter(x, 3) is x and single().leave(x) is x


def traffic_of_a_pack(world: World, tokens: int, shard_tokens: bool) -> tuple[Counter, Counter]:
    """Bytes sent in forward, and in backward, of a pack with ``LABELLED`` labels."""
    grid = Grid(world, GridShape(1, 1, world.size))
    model = GPT(MODEL, "sdpa", tp=TensorParallel(grid.tp, shard_tokens)).double()
    weight = torch.zeros(tokens)
    weight[:LABELLED] = 1.0
    ids = torch.zeros(tokens, dtype=torch.int64)
    loss, _ = model(ids, torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens, ids, weight)
    forward = Counter(grid.traffic.sent)
    loss.backward()
    return forward, grid.traffic.sent - forward


@pytest.mark.parametrize(("size", "tokens"), [(2, 16), (2, 13), (4, 13)])
def test_a_model_sends_what_the_formulas_say_and_never_its_logits(run_ranks: RunRanks, size: int, tokens: int) -> None:
    stream = tokens * MODEL.hidden_size * 8
    regions = 2 * MODEL.num_layers
    loss = 2 * (size - 1) * LABELLED * 8 // size + 2 * (size - 1) * 2 * LABELLED * 8 // size
    whole = 2 * (size - 1) * stream // size
    for forward, backward in run_ranks(size, traffic_of_a_pack, tokens, False):
        # The embedding leaves a region without having entered one, the head enters one that it does not leave.
        assert forward == {("tp", "all_reduce"): (regions + 1) * whole + loss}
        assert backward == {("tp", "all_reduce"): (regions + 1) * whole}
    padded = -(-tokens // size) * size * MODEL.hidden_size * 8
    share = (size - 1) * padded // size
    for forward, backward in run_ranks(size, traffic_of_a_pack, tokens, True):
        assert forward == {
            ("tp", "reduce_scatter"): (regions + 1) * share,
            ("tp", "all_gather"): (regions + 1) * share,
            ("tp", "all_reduce"): loss,
        }
        assert backward == {("tp", "reduce_scatter"): (regions + 1) * share, ("tp", "all_gather"): (regions + 1) * share}


def first_weights(world: World) -> list[tuple[str, tuple, torch.Tensor]]:
    model = GPT(MODEL, tp=group_of(world))
    model.reset_parameters(5)
    return [(name, box, model.get_parameter(name).detach()) for name, (_, box) in parameter_boxes(model).items()]


def test_first_weights_are_the_same_on_every_division(run_ranks: RunRanks) -> None:
    whole = GPT(MODEL)
    whole.reset_parameters(5)
    for parts in run_ranks(4, first_weights):
        for name, box, values in parts:
            expected = whole.get_parameter(name).detach()
            assert torch.equal(values, expected[slices(box, whole_box(expected.shape))]), name
