"""The tiled MLP against transformers' whole one, and what it keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.mlp import MLP, set_tile
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.tensor import TensorParallel, single
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.model.test_gpt import LENGTHS, Pack, model_of, saved_bytes
from tests.peak_memory import peak_bytes

CONFIG = ModelConfig(16, 12, 40, 2, 4, 2, 4, 64, mlp_bias=True)


def drawn(module: nn.Module) -> nn.Module:
    """``module`` in float64 with weights that depend on its sizes alone."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def mlp_of(tile: int | None, config: ModelConfig = CONFIG) -> MLP:
    mlp = drawn(MLP(config, single()))
    set_tile(mlp, tile)
    return mlp


def input_of(tokens: int, config: ModelConfig = CONFIG) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()


def results(mlp: nn.Module, x: Tensor, *arguments: int) -> dict[str, Tensor]:
    """Output, and gradients of a sum with uneven weights, by name."""
    out = mlp(x, *arguments)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return {"out": out.detach(), "x": x.grad} | {name: parameter.grad for name, parameter in mlp.named_parameters()}


def transformers_mlp(config: ModelConfig) -> nn.Module:
    """Its down projection has a bias where gate and up have one: here it is 0."""
    theirs = LlamaMLP(LlamaConfig(hidden_size=config.hidden_size, intermediate_size=40, num_attention_heads=4, mlp_bias=config.mlp_bias))
    ours = mlp_of(None, config)
    theirs.double().load_state_dict(ours.state_dict(), strict=False)
    if config.mlp_bias:
        nn.init.zeros_(theirs.down_proj.bias)
    return theirs


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
@pytest.mark.parametrize("tokens", [0, 1, 8, 23])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_whole_mlp_of_transformers(tokens: int, tile: int, bias: bool) -> None:
    config = replace(CONFIG, mlp_bias=bias)
    expected = results(transformers_mlp(config), input_of(tokens))
    found = results(mlp_of(tile, config), input_of(tokens), tokens)
    assert len(found) == 5 + 2 * bias
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["gate_proj.weight", "up_proj.bias", "x"])
def test_what_does_not_learn_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    expected, mlp, x = results(mlp_of(4), input_of(23), 23), mlp_of(4), input_of(23)
    (x if frozen == "x" else mlp.get_parameter(frozen)).requires_grad_(False)
    found = results(mlp, x, 23)
    assert found.pop(frozen) is None
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_without_gradients_the_output_is_the_same() -> None:
    mlp, x = mlp_of(4), input_of(23)
    expected = results(mlp, x, 23)["out"]
    with torch.no_grad():
        assert torch.equal(mlp(x, 23), expected)


def test_bfloat16_gradients_of_many_tiles_are_summed_in_float32() -> None:
    exact, tokens = results(mlp_of(None), input_of(400), 400), 400
    found = results(mlp_of(4).bfloat16(), input_of(400).detach().bfloat16().requires_grad_(), tokens)
    whole = results(mlp_of(None).bfloat16(), input_of(400).detach().bfloat16().requires_grad_(), tokens)
    for name in ("gate_proj.weight", "down_proj.weight", "up_proj.bias"):
        error, error_of_whole = ((each[name].double() - exact[name]).norm() for each in (found, whole))
        assert error < 1.5 * error_of_whole, name


def divided(world: World) -> list[dict[str, Tensor]]:
    """Results of a rank, tiled and whole, with all tokens outside and with its own."""
    group = Grid(world, GridShape(1, 1, world.size)).tp
    return [divided_results(TensorParallel(group, shard_tokens), tile) for shard_tokens in (False, True) for tile in (5, None)]


def divided_results(tp: TensorParallel, tile: int | None) -> dict[str, Tensor]:
    mlp, whole = MLP(CONFIG, tp).double(), mlp_of(None)
    rows = mlp.gate_proj.split
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            value = whole.get_parameter(name)
            parameter.copy_(value[:, rows.start : rows.stop] if name == "down_proj.weight" else value[rows.start : rows.stop])
    set_tile(mlp, tile)
    x = input_of(22)
    mine = x.detach().split(22 // tp.group.size)[tp.group.rank] if tp.shard_tokens else x.detach()
    return results(mlp, mine.clone().requires_grad_(), 22)


def test_on_tensor_parallel_ranks(run_ranks: RunRanks) -> None:
    whole = results(mlp_of(None), input_of(22), 22)
    for tiled, untiled, tiled_shards, untiled_shards in run_ranks(2, divided):
        torch.testing.assert_close(untiled["out"], whole["out"], rtol=1e-12, atol=1e-12)
        for found, expected in ((tiled, untiled), (tiled_shards, untiled_shards)):
            assert found.keys() == whole.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_the_intermediate_channels_never_exist_at_once() -> None:
    wide, tokens = replace(CONFIG, hidden_size=8, intermediate_size=256), 4096
    channels = tokens * wide.intermediate_size * 8

    def step(tile: int | None) -> int:
        mlp, x = mlp_of(tile, wide), input_of(tokens, wide)
        return peak_bytes(lambda: mlp(x, tokens).sum().backward())

    assert step(None) > 4 * channels
    assert step(64) < channels / 4


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_in_a_model_numbers_are_the_same_and_less_is_kept(recompute: str) -> None:
    pack, whole, tiles = Pack(LENGTHS), model_of(), model_of(recompute=recompute)
    set_tile(tiles, 4)
    for model in (whole, tiles):
        pack.loss(model)[0].backward()
    for name, parameter in tiles.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-11, atol=1e-12)
    limits = {"none": 0.8, "selective": 0.6, "full": 0.5}
    assert saved_bytes(tiles, pack) < limits[recompute] * saved_bytes(whole, pack)


def test_selective_recomputation_keeps_no_products_of_tiles() -> None:
    config = ModelConfig(16, 8, 512, 2, 2, 2, 4, 1024)
    tokens = torch.zeros(512, dtype=torch.int64)
    boundaries = torch.tensor([0, 512], dtype=torch.int32)

    def step(tile: int | None) -> int:
        model = model_of(config, recompute="selective")
        set_tile(model, tile)
        return peak_bytes(lambda: model(tokens, torch.arange(512), boundaries, 512, tokens, torch.ones(512))[0].backward())

    channels = 512 * 512 * 8
    assert step(None) > 4 * channels
    assert step(64) < 2 * channels
