"""Other weights of the same function: gains of norms folded into the linears behind them, activations turned by Hadamard matrices.

RMSNorm without gains commutes with any orthogonal matrix, so that the residual stream can be turned: what writes into it is turned, what
reads from it is turned back (SliceGPT, arXiv:2401.15024, theorem 1). A random turn spreads an outlier channel over all channels, and leaves
numbers that are easy to quantize (QuaRot, arXiv:2404.00456, section 4).

Weights are named tensors of a whole model, as in its checkpoint. The functions return new ones, computed in float64 and rounded to the
type of the old.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.hadamard import hadamard_transform, split_order
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.model.norm_options import NormOptions

Weights = dict[str, Tensor]

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a block, and the linears that read from each."""
READERS = tuple(f"{linear}.weight" for linears in NORMS.values() for linear in linears)
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
INSIDE = ("_proj.bias", "q_norm.weight", "k_norm.weight")
"""Parameters inside attention, which the residual stream does not reach."""


def fold_norms(weights: Mapping[str, Tensor], config: ModelConfig) -> tuple[Weights, ModelConfig]:
    """Multiply the gains of the norms on the residual stream into the linears that read from them; the gains become 1.

    A tied head is untied, because the gain of the final norm goes into the head but not into the embedding. Norms of queries and keys
    stay: no linear is behind them.

    Returns:
        The weights, and the shape of the model that they are of.

    Raises:
        ConfigError: the weights are not those of ``config``, or its norms are not those of Llama.
    """
    _check(weights, config)
    _check_norms(config)
    folded = dict(weights)
    folded[HEAD] = weights[EMBEDDING if config.tie_embeddings else HEAD]
    behind = {FINAL_NORM: (HEAD,)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for norm, linears in NORMS.items():
            behind[f"{prefix}{norm}.weight"] = tuple(f"{prefix}{linear}.weight" for linear in linears)
    for norm, linears in behind.items():
        for linear in linears:
            folded[linear] = (folded[linear].double() * weights[norm].double()).to(folded[linear].dtype)
        folded[norm] = torch.ones_like(weights[norm])
    return folded, replace(config, tie_embeddings=False)


def rotate_residual(weights: Mapping[str, Tensor], config: ModelConfig, seed: int) -> Weights:
    """Turn the residual stream x to x Q, Q = diag(s) H^T / sqrt(n) with signs s drawn from ``seed``.

    Raises:
        ConfigError: gains of norms are not 1, or the weights are not those of ``config``, or its norms are not those of Llama.
    """
    _check(weights, config)
    _check_norms(config)
    norms = [FINAL_NORM] + [f"model.layers.{layer}.{norm}.weight" for layer in range(config.num_layers) for norm in NORMS]
    unfolded = [name for name in norms if not torch.equal(weights[name], torch.ones_like(weights[name]))]
    if unfolded:
        raise ConfigError(f"{unfolded[0]} is not all 1; the residual stream can be turned after fold_norms")
    signs = torch.randint(0, 2, (config.hidden_size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    block = hadamard_block(config.hidden_size)
    turned = dict(weights)
    for name, weight in weights.items():
        if name.endswith(READERS) or name in (EMBEDDING, HEAD):
            turned[name] = _turn_inputs(weight, block, signs)
        elif name.endswith(WRITERS):
            turned[name] = _turn_outputs(weight, block, signs)
        elif name not in norms and not name.endswith(INSIDE):
            raise ConfigError(f"{name}: what a turn of the residual stream does to this parameter is not known")
    return turned


def rotate_heads(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Turn the values of every head, and with them the inputs of ``o_proj``; queries and keys stay.

    All heads turn alike, so that query heads may share values. Raises ConfigError if the weights are not those of ``config``.
    """
    _check(weights, config)
    block = hadamard_block(config.head_dim)
    turned = dict(weights)
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            turned[name] = _turn_inputs(weight, block)
        elif name.endswith(("v_proj.weight", "v_proj.bias")):
            turned[name] = _turn_outputs(weight, block)
    return turned


def rotate_down_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Weights of ``down_proj`` for inputs that are turned on the way, by ``orthonormal_hadamard`` in blocks of ``hadamard_block``.

    Raises ConfigError if the weights are not those of ``config``.
    """
    _check(weights, config)
    block = hadamard_block(config.intermediate_size)
    return {name: _turn_inputs(weight, block) if name.endswith("down_proj.weight") else weight for name, weight in weights.items()}


def orthonormal_hadamard(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """``x`` [..., n] with every ``block`` neighbours times signs, turned by a Hadamard matrix; keeps lengths.

    float64 is computed by the definition, to the accuracy of float64; float32 and bfloat16 as ``hadamard_transform`` chooses.
    """
    if x.dtype == torch.float64:
        return hadamard_transform(x, 1.0, signs, block, backend="torch") / math.sqrt(block)
    return hadamard_transform(x, 1 / math.sqrt(block), signs, block)


def hadamard_block(size: int) -> int:
    """Largest divisor of ``size`` that is the order of a Hadamard matrix: ``size`` itself if it is one, else a block-diagonal turn.

    Raises:
        ConfigError: there is none but 1.
    """
    for block in range(size, 1, -1):
        if size % block == 0 and _has_hadamard_matrix(block):
            return block
    raise ConfigError(f"a dimension of {size} can not be turned by Hadamard matrices; accepted are even numbers")


def _has_hadamard_matrix(order: int) -> bool:
    try:
        split_order(order)
    except ConfigError:
        return False
    return True


def _turn_inputs(weight: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """W [out, in] for inputs x Q instead of x; also an embedding [V, h], whose rows are turned themselves."""
    return orthonormal_hadamard(weight.double(), block, signs).to(weight.dtype)


def _turn_outputs(weight: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """W [out, in], or a bias [out], for outputs y Q instead of y."""
    return _turn_inputs(weight.transpose(0, -1), block, signs).transpose(0, -1).contiguous()


def _check(weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    shapes = parameter_shapes(config)
    if wrong := sorted(weights.keys() ^ shapes.keys()):
        raise ConfigError(f"weights of another model: {wrong[0]} is {'unknown' if wrong[0] in weights else 'missing'}")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ConfigError(f"weights of another model: {name} is {list(weights[name].shape)}; expected {list(shape)}")


def _check_norms(config: ModelConfig) -> None:
    """Other norms, and norms elsewhere, do not let a turn through, or are not known here."""
    if config.norm != NormOptions() or config.embedding_projection:
        raise ConfigError(
            f"{config.norm} with embedding_projection {config.embedding_projection}: the residual stream cannot be turned; accepted are "
            "RMSNorm before attention and MLP, and no projection. tools/convert_checkpoint.py export makes that of what can be folded"
        )
