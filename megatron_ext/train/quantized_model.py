"""A trained model in forms that compute the same, and with the linears of its blocks quantized for a while.

The embedding, the norms, attention and the head are not quantized.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ext.checkpoint.hf import load_hf_config, read_hf_tensors
from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.rotation import (
    Weights,
    fold_norms,
    hadamard_block,
    orthonormal_hadamard,
    rotate_down_weights,
    rotate_heads,
    rotate_residual,
)
from megatron_ext.precision.post_training import Scheme

ROTATIONS: Mapping[str, str] = {
    "none": "weights as they are",
    "hadamard": "inputs of down_proj turned by a Hadamard matrix on the way",
    "quarot": "the same, and norms folded, the residual stream and the values of heads turned",
}
"""Forms of a model that compute the same, by name."""


def read_weights(directory: Path) -> tuple[Weights, ModelConfig]:
    """The weights of a Hugging Face directory, at least float32, and their shape.

    Raises CheckpointError as ``load_hf_weights``, and for a run's checkpoint as ``check_undamaged``.
    """
    check_undamaged(directory)
    config = load_hf_config(directory)
    tensors = read_hf_tensors(directory, config)
    return {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors}, config


def build_rotated(weights: Weights, config: ModelConfig, rotation: str, seed: int, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model in one of the forms of ``ROTATIONS``; they compute the same but for rounding.

    Args:
        weights: of the whole model.
        config: its shape.
        rotation: a key of ``ROTATIONS``.
        seed: of the signs that turn the residual stream.
        device: of the model.
        dtype: of the model.

    Raises:
        ConfigError: a dimension cannot be turned, or the weights are not those of ``config``.
    """
    if rotation == "quarot":
        weights, config = fold_norms(weights, config)
        weights = rotate_heads(rotate_residual(weights, config, seed), config)
    if rotation != "none":
        weights = rotate_down_weights(weights, config)
    with torch.device("meta"):
        model = GPT(config)
    model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    if rotation != "none":
        turn = partial(orthonormal_hadamard, block=hadamard_block(config.intermediate_size))
        for name, linear in block_linears(model).items():
            if name.endswith("down_proj"):
                linear.register_forward_pre_hook(_changed_input(turn))
    return model.eval()


def rotation_blocks(config: ModelConfig, rotation: str) -> list[tuple[str, int, int]]:
    """What ``build_rotated`` turns: its name, its size, and the order of the Hadamard matrices on the diagonal of the turn."""
    sizes = {"down_proj inputs": config.intermediate_size} if rotation != "none" else {}
    if rotation == "quarot":
        sizes |= {"residual stream": config.hidden_size, "heads": config.head_dim}
    return [(what, size, hadamard_block(size)) for what, size in sizes.items()]


def block_linears(model: GPT) -> dict[str, nn.Linear]:
    """The linears inside the blocks, by name (``model.layers.3.mlp.down_proj``), in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("model.layers.")}


@contextmanager
def quantized(model: GPT, scheme: Scheme, only: Collection[str] | None = None) -> Iterator[None]:
    """The linears of ``model``, keys and values are quantized inside the block, and as before behind it.

    Args:
        model: whose parameters are changed in place.
        scheme: how.
        only: names of linears, and no keys and values; None: all inside blocks.
    """
    linears = [linear for name, linear in block_linears(model).items() if only is None or name in only]
    attentions = [block.self_attn for block in model.model.layers.values()] if only is None else []
    hooks, weights = [], []
    try:
        for attention in attentions:
            attention.cache_quantizer = scheme.cache
        for linear in linears:
            if scheme.weight is not None:
                weights.append((linear, linear.weight.data))
                linear.weight.data = scheme.weight(linear.weight.data)
            if scheme.activation is not None:
                hooks.append(linear.register_forward_pre_hook(_changed_input(scheme.activation)))
        yield
    finally:
        for attention in attentions:
            attention.cache_quantizer = None
        for hook in hooks:
            hook.remove()
        for linear, weight in weights:
            linear.weight.data = weight


def _changed_input(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[object, ...]]:
    """A hook before a linear; what else the linear is given passes."""

    def hook(linear: nn.Module, arguments: tuple[object, ...]) -> tuple[object, ...]:
        x, *rest = arguments
        assert isinstance(x, Tensor), "a linear is given its input first"
        return (change(x), *rest)

    return hook
