"""Whether labels are the tokens that the model holds likeliest, where tensor-parallel ranks divide the vocabulary."""

import torch
from torch import Tensor

from megatron_ext.model.loss import chunk_tokens
from megatron_ext.parallel.group import MAX, MIN, Group
from megatron_ext.parallel.split import Split, even_split
from megatron_ext.parallel.tensor import single


def is_likeliest(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Split | None = None, group: Group | None = None) -> Tensor:
    """Whether each label is the argmax of ``hidden @ weight.T``: bool [T]. Of equal logits the first is the argmax.

    ``hidden`` [T, h], ``weight`` [V, h] and ``labels`` int64 [T] as in ``linear_cross_entropy``, and so are ``rows`` and ``group`` where
    each rank has some rows of the weight, [V / n, h]: the logits are not gathered; of each token 2 numbers are all-reduced.
    """
    rows, group = rows or even_split(len(weight), 0, 1), group or single().group
    found = []
    for x in hidden.split(chunk_tokens(weight.device, rows.total // group.size)):
        largest, place = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)).max(1)
        over_all = group.all_reduce(largest.clone(), MAX)
        place = (place + rows.start).masked_fill(largest < over_all, rows.total)
        found.append(group.all_reduce(place, MIN))
    return torch.cat(found) == labels if found else labels == labels
