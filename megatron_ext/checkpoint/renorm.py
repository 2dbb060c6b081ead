"""The same function with cheaper norms: LayerNorm as RMSNorm, and RMSNorm as CRMSNorm (Jiang et al. 2023, arXiv:2305.14858, section 3).

The mean of the residual stream reaches nothing that LayerNorm gives, so whatever writes to the stream can write vectors of mean zero
instead; of those, LayerNorm is RMSNorm. And one channel of them is minus the sum of the others, so that it need not be stored.
"""

import re
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_ext.checkpoint.fold import Read, folded_embedding, folded_head
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.norm_kinds import depth_factor
from megatron_ext.model.rotation import EMBEDDING, HEAD, NORMS, WRITERS

LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
FINAL_NORM = "model.norm"


def layer_to_rms(read: Read, config: ModelConfig) -> tuple[Read, ModelConfig]:
    """Weights with RMSNorm of a model with LayerNorm, by name, computed in float64 when asked for, and its shape.

    What norms add goes into biases of the linears behind them, where it is not zero; gains stay in the norms. A tied head is untied, and
    projections and norms of embeddings go into embedding and head.

    Args:
        read: gives a parameter of ``config`` by its name.
        config: shape of a model with norms of kind ``layer`` before attention and MLP.

    Raises:
        CheckpointError: the norms are other ones, or elsewhere.
    """
    _require(config, "layer")
    norms = [f"model.layers.{layer}.{norm}" for layer in range(config.num_layers) for norm in NORMS]
    adding = {norm.rpartition(".")[2] for norm in [*norms, FINAL_NORM] if read(f"{norm}.bias").any()}
    converted = replace(
        config,
        norm=replace(config.norm, kind="rms", embedding_norm=False),
        embedding_projection=False,
        tie_embeddings=False,
        qkv_bias=config.qkv_bias or "input_layernorm" in adding,
        mlp_bias=config.mlp_bias or "post_attention_layernorm" in adding,
        head_bias=config.head_bias or "norm" in adding,
    )
    return partial(_centred, read, config), converted


def rms_to_crms(read: Read, config: ModelConfig) -> tuple[Read, ModelConfig]:
    """Weights with CRMSNorm of a model with RMSNorm whose residual stream has mean zero; arguments and results as ``layer_to_rms``.

    The stream has one channel less. Gains go into the linears behind the norms, because that of the channel that is left out has no place.

    Raises:
        CheckpointError: the norms are other ones, or elsewhere, or the mean of what is written to the stream is not zero.
    """
    _require(config, "rms")
    writers = [f"model.layers.{layer}.{writer}" for layer in range(config.num_layers) for writer in WRITERS]
    for name, dimension in [(EMBEDDING, 1), *((writer, 0) for writer in writers)]:
        weight = read(name)
        mean, largest = weight.double().mean(dimension).abs().max(), weight.abs().max()
        if mean > 2 * torch.finfo(weight.dtype).eps * largest:
            raise CheckpointError(
                f"{name} writes vectors of mean {mean:.3g} to the residual stream; accepted is 0, as renorm makes it of layer"
            )
    converted = replace(config, hidden_size=config.hidden_size - 1, norm=replace(config.norm, kind="crms"), tie_embeddings=False)
    return partial(_without_last_channel, read, config), converted


def _require(config: ModelConfig, kind: str) -> None:
    norm = config.norm
    if norm.kind != kind or norm.placement != "pre":
        raise CheckpointError(
            f"model.norm.kind {norm.kind!r} with placement {norm.placement!r}; accepted here: {kind!r} with placement 'pre'"
        )
    if kind == "rms" and (norm.embedding_norm or config.embedding_projection):
        raise CheckpointError("model.norm.embedding_norm, model.embedding_projection: accepted is false, as renorm makes it of layer")
    if config.hidden_size < 2:
        raise CheckpointError("model.hidden_size is 1; accepted is more, because a vector of one channel and mean zero is zero")


def norm_before(linear: str) -> tuple[str, int | None] | None:
    """Name of the norm that a linear of a pre-norm block, or the head, reads from, and its layer; None if it reads something else."""
    if linear == "lm_head":
        return FINAL_NORM, None
    match = LAYER.fullmatch(linear)
    found = next((norm for norm, linears in NORMS.items() if match and match[3] in linears), None)
    return None if found is None or match is None else (match[1] + found, int(match[2]))


def _centred(read: Read, config: ModelConfig, name: str) -> Tensor:
    linear, _, part = name.rpartition(".")
    behind = norm_before(linear)
    if name == EMBEDDING:
        rows = folded_embedding(read, config).double()
        return rows - rows.mean(1, keepdim=True)
    if name.endswith(WRITERS):
        weight = read(name).double()
        return weight - weight.mean(0, keepdim=True)
    if behind is None or part != "bias":
        return folded_head(read, config) if name == HEAD else read(name)
    norm, layer = behind
    if layer is None:
        weight, factor, has_bias = folded_head(read, config), 1.0, config.head_bias
    else:
        weight, factor = read(f"{linear}.weight"), depth_factor(config, layer)
        has_bias = config.qkv_bias if ".self_attn." in linear else config.mlp_bias
    added = weight.double() @ (read(f"{norm}.bias").double() * factor)
    return added + read(name) if has_bias else added


def _without_last_channel(read: Read, config: ModelConfig, name: str) -> Tensor:
    linear, _, part = name.rpartition(".")
    behind = norm_before(linear)
    if name == EMBEDDING:
        return read(name)[:, :-1]
    if name.endswith(WRITERS):
        return read(name)[:-1]
    if behind is not None and part == "weight":
        weight = read(EMBEDDING if config.tie_embeddings and name == HEAD else name).double() * read(f"{behind[0]}.weight").double()
        return weight[:, :-1] - weight[:, -1:]
    if name == f"{FINAL_NORM}.weight" or name.endswith("layernorm.weight"):
        return torch.ones_like(read(name)[:-1])
    return read(name)
