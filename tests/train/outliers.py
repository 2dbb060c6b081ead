"""A small model that knows its data, and the same with planted outlier channels: what quantization has to do with."""

import torch

from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.rotation import READERS, Weights
from megatron_ext.train.quantized_model import build_rotated

SHAPE = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_position=64
)
CHANNEL = 5


def random_weights(residual: float = 0.0, down: float = 1.0) -> Weights:
    """Random weights whose activations have variance 1.

    Args:
        residual: the same large value in one channel of every embedding, of which readers see little.
        down: factor of one channel of the inputs of down_proj, which down_proj takes back: the model computes the same.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in GPT(SHAPE).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = torch.ones_like(noise) if noise.ndim == 1 else noise * noise.shape[1] ** -0.5
    weights["model.embed_tokens.weight"] *= 8
    weights["lm_head.weight"] *= 3
    if residual:
        weights["model.embed_tokens.weight"][:, CHANNEL] = residual
        for name in weights:
            if name.endswith((*READERS, "lm_head.weight")):
                weights[name] *= (1 + residual**2 / SHAPE.hidden_size) ** 0.5
                weights[name][:, CHANNEL] /= residual
    for layer in range(SHAPE.num_layers):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][CHANNEL] *= down
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, CHANNEL] /= down
    return weights


def model_of(weights: Weights, rotation: str = "none") -> GPT:
    return build_rotated(weights, SHAPE, rotation, 0, torch.device("cpu"), torch.float32)


@torch.no_grad()
def answered_packs(model: GPT, count: int = 4) -> list[PackedBatch]:
    """Packs of two documents each, whose labels are what the model finds likeliest."""
    packs = []
    for seed in range(count):
        tokens = torch.randint(0, SHAPE.vocab_size, (64,), generator=torch.Generator().manual_seed(seed))
        positions = torch.cat((torch.arange(40), torch.arange(24))).int()
        cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32)
        labels = model.logits(tokens, positions, cu_seqlens, 40).argmax(-1)
        packs.append(PackedBatch(tokens, labels, positions, cu_seqlens, torch.ones(64), torch.zeros(64, dtype=torch.int64), 40))
    return packs
