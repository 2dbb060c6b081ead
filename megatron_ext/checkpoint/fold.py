"""Weights of a Hugging Face family with the same function, where the parts that no family has can be multiplied into others."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_ext.checkpoint.own_config import no_family_has
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.norm_kinds import build_norm, depth_factor
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rotation import EMBEDDING, HEAD

ROWS = 8192
"""Rows of an embedding or head that are computed at once."""
Read = Callable[[str], Tensor]


def fold(read: Read, config: ModelConfig) -> tuple[Read, ModelConfig]:
    """Weights of the folded model by name, computed in float64 when asked for, and its shape.

    A gain for all channels becomes the same gain for each; factors of depth go into gains; what stands between the vocabulary and the
    blocks goes into the embedding and the head, which are then no longer tied.

    Args:
        read: gives a parameter of ``config`` by its name.
        config: shape of the model.

    Raises:
        CheckpointError: names what cannot be folded.
    """
    folded = _folded_config(config)
    if left := no_family_has(folded):
        convertible = (config.norm.kind, config.norm.placement) == ("layer", "pre")
        hint = "; tools/convert_checkpoint.py renorm makes rms of layer" if convertible else ""
        raise CheckpointError(f"{', '.join(left)}: this cannot be folded into a model that a Hugging Face family has{hint}")
    return partial(_folded, read, config), folded


def _folded_config(config: ModelConfig) -> ModelConfig:
    """Without what can be folded."""
    norm = config.norm
    left = config.norm if norm.placement != "pre" or norm.kind not in ("rms", "ss") else NormOptions()
    apart = config.embedding_projection or norm.embedding_norm
    return replace(config, norm=left, embedding_projection=False, tie_embeddings=config.tie_embeddings and not apart)


def _folded(read: Read, config: ModelConfig, name: str) -> Tensor:
    if name == EMBEDDING:
        return folded_embedding(read, config)
    if name == HEAD:
        return folded_head(read, config)
    if name == "model.norm.weight":
        return read(name).expand(config.hidden_size)
    if name.endswith("layernorm.weight"):
        return read(name).double().expand(config.hidden_size) * depth_factor(config, int(name.split(".")[2]))
    return read(name)


def folded_embedding(read: Read, config: ModelConfig) -> Tensor:
    """What the first block is given for each token of the vocabulary."""
    projection = read("model.embed_projection.weight").double() if config.embedding_projection else None
    norm = build_norm(config, partial=False).double() if config.norm.embedding_norm else None
    if norm is not None:
        norm.load_state_dict({name: read(f"model.embed_norm.{name}") for name in norm.state_dict()})

    def change(rows: Tensor) -> Tensor:
        rows = rows if projection is None else rows @ projection.T
        return rows if norm is None else norm(rows)

    return _by_rows(read(EMBEDDING), change)


def folded_head(read: Read, config: ModelConfig) -> Tensor:
    """A head that reads what the final norm gives."""
    projection = read("model.head_projection.weight").double() if config.embedding_projection else None
    head = read(EMBEDDING if config.tie_embeddings else HEAD)
    return _by_rows(head, lambda rows: rows if projection is None else rows @ projection)


@torch.no_grad()
def _by_rows(matrix: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` of all rows in float64, in at least float32."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.cat([change(rows.double()).to(dtype) for rows in matrix.split(ROWS)])
