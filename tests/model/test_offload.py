"""Block inputs on the host: the same bits, and nothing of them left on the way."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.mlp import set_tile
from megatron_ext.model.offload import HostCopy, kept_on_host
from megatron_ext.parallel.device import HostTransfer
from tests.model.test_gpt import CONFIG, LENGTHS, Pack, model_of

CPU = torch.device("cpu")


class Counted(HostTransfer):
    """Counts what goes and comes."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.out: list[tuple[int, ...]] = []
        self.back: list[int] = []

    def to_host(self, tensor: Tensor) -> Tensor:
        self.out.append(tuple(tensor.shape))
        return super().to_host(tensor)

    def to_device(self, host: Tensor) -> Tensor:
        self.back.append(host.data_ptr())
        return super().to_device(host)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed in here is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def host_copies() -> list[HostCopy]:
    return [each for each in gc.get_objects() if isinstance(each, HostCopy)]


@pytest.mark.parametrize(("recompute", "tile", "inputs_of_a_block"), [("full", None, 1), ("selective", None, 1), ("selective", 4, 2)])
def test_no_bit_changes_and_only_block_inputs_go(recompute: str, tile: int | None, inputs_of_a_block: int) -> None:
    pack, plain, offloading = Pack(LENGTHS), model_of(recompute=recompute), model_of(recompute=recompute)
    offloading.offload = transfer = Counted()
    losses = []
    for model in (plain, offloading):
        set_tile(model, tile)
        for each in (pack, *pack.documents()[:2]):
            loss, _ = each.loss(model)
            loss.backward()
            losses.append(loss.detach())
    assert losses[:3] == losses[3:]
    assert all(torch.equal(parameter.grad, offloading.get_parameter(name).grad) for name, parameter in plain.named_parameters())
    count = inputs_of_a_block * CONFIG.num_layers
    assert transfer.out == [(length, CONFIG.hidden_size) for length in (sum(LENGTHS), *LENGTHS[:2]) for _ in range(count)]
    assert len(transfer.back) == len(transfer.out), "each comes back once"


@pytest.mark.usefixtures("no_collector")
def test_copies_are_freed_as_backward_goes() -> None:
    model = model_of(ModelConfig(37, 24, 40, 5, 6, 2, 4, 64), recompute="full")
    model.offload = HostTransfer(CPU)
    loss, _ = Pack(LENGTHS).loss(model)
    assert len(host_copies()) == 5
    alive: list[int] = []
    for block in model.model.layers.values():
        block.mlp.down_proj.weight.register_post_accumulate_grad_hook(lambda _: alive.append(len(host_copies())))
    loss.backward()
    assert alive == sorted(alive, reverse=True) and alive[-1] == 1
    assert not host_copies()


def test_the_tensor_before_comes_back_early() -> None:
    transfer = Counted()
    leaves = [torch.full((3,), float(n), dtype=torch.float64, requires_grad=True) for n in range(3)]
    with kept_on_host(transfer):
        out = (leaves[0] ** 2).sum()
        for leaf in leaves[1:]:
            out = out + (leaf**2).sum()
    begun: list[int] = []
    leaves[2].register_hook(lambda _: begun.append(len(transfer.back)))
    out.backward()
    assert begun == [2], "the last one, and the one before it"
    assert [leaf.grad.tolist() for leaf in leaves] == [[2.0 * n] * 3 for n in range(3)]


def test_evaluation_moves_nothing() -> None:
    model = model_of(recompute="full").eval()
    model.offload = transfer = Counted()
    Pack(LENGTHS).loss(model)[0].backward()
    assert transfer.out == []
