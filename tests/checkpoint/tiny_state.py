"""A small model with an optimizer that has moments, and a writer for its checkpoints."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.checkpoint.save import CheckpointWriter
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from tests.grids import ALONE, data_grid

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=32,
    init_std=0.2,
)


def weight_of(model: GPT) -> Callable[[str], torch.Tensor]:
    """What ``save`` asks for the weights."""
    return dict(model.named_parameters()).__getitem__


def trained(world: World = ALONE, dtype: torch.dtype = torch.float32, seed: int = 0, steps: int = 2) -> tuple[GPT, ShardedOptimizer]:
    """A model after a few updates from gradients that depend on ``seed``."""
    model = GPT(CONFIG, "sdpa")
    model.reset_parameters(seed)
    model.to(dtype)
    optimizer = build_optimizer(model, OptimizerOptions(lr=0.01), data_grid(world))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            (parameter * torch.randn(parameter.shape, generator=generator).to(dtype)).sum().backward()
        optimizer.step()
    return model, optimizer


def writer(
    root: Path, world: World = ALONE, keep_last: int = 2, max_shard_bytes: int = 2**30, dtype: torch.dtype = torch.float32
) -> CheckpointWriter:
    """Writes to ``root``; the tokenizer is one file."""

    def copy_tokenizer(directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"version": 1}', "utf-8")

    return CheckpointWriter(
        root, data_grid(world), config_to_hf(CONFIG, dtype=str(dtype).removeprefix("torch.")), copy_tokenizer, keep_last, max_shard_bytes
    )
