"""Which part of each parameter of the whole model this rank's model holds, read off its layers."""

from collections.abc import Iterator

import torch
from torch import nn

from megatron_ext.model.embedding_projection import EmbeddingProjection
from megatron_ext.model.norm import Norm
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Box, Placement, whole_box
from megatron_ext.parallel.split import Split
from megatron_ext.parallel.tensor import ColumnLinear, RowLinear, VocabularyEmbedding

EMBEDDING = "model.embed_tokens.weight"


def parameter_boxes(model: nn.Module) -> dict[str, tuple[torch.Size, Box]]:
    """Shape of the whole parameter, and the box of it that ``model`` holds, by name, in the order of the model."""
    return {name: _box(module, parameter) for name, module, parameter in _parameters(model)}


def placements(model: nn.Module, grid: Grid, tied: bool) -> dict[str, Placement]:
    """Placement of every parameter that ``model`` holds on this rank of ``grid``, by name, in the order of the model.

    Args:
        model: a stage's model with its tensor-parallel parts.
        grid: its ranks.
        tied: the output head is the embedding: then the first and the last stage both hold it.
    """
    found = {}
    for name, module, parameter in _parameters(model):
        shape, box = _box(module, parameter)
        replicas, partial = _replicas(module, grid)
        if tied and name == EMBEDDING and grid.shape.pp > 1:
            replicas, partial = (grid.pp.ranks[0], grid.pp.ranks[-1]), True
        found[name] = Placement(shape, box, replicas, partial)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, module and value of every parameter; one that two modules share comes once, as in ``named_parameters``."""
    for name, parameter in model.named_parameters():
        yield name, model.get_submodule(name.rpartition(".")[0]), parameter


def _box(module: nn.Module, parameter: nn.Parameter) -> tuple[torch.Size, Box]:
    split = _split(module)
    dimension = 1 if isinstance(module, RowLinear) else 0
    shape, box = list(parameter.shape), list(whole_box(parameter.shape))
    if split is not None:
        shape[dimension], box[dimension] = split.total, (split.start, split.stop)
    return torch.Size(shape), tuple(box)


def _replicas(module: nn.Module, grid: Grid) -> tuple[tuple[int, ...], bool]:
    """The tensor-parallel ranks with the same part as this one, and whether each has only a part of its gradient."""
    split, ranks, rank = _split(module), grid.tp.ranks, grid.tp.rank
    if split is None:
        return ranks, len(ranks) > 1 and isinstance(module, Norm | EmbeddingProjection) and module.partial
    first = rank // split.copies * split.copies
    return ranks[first : first + split.copies], split.copies > 1


def _split(module: nn.Module) -> Split | None:
    return module.split if isinstance(module, ColumnLinear | RowLinear | VocabularyEmbedding) else None
