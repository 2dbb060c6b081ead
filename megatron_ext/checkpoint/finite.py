"""Weights that are not finite must never become a checkpoint: it would be the one that the run resumes from."""

import torch

from megatron_ext.errors import NonFiniteError


def require_finite(name: str, kind: str, values: torch.Tensor) -> torch.Tensor:
    """``values``, if all of them are finite.

    Args:
        name: of the parameter.
        kind: what of it the values are.

    Raises:
        NonFiniteError: names the parameter, how many values are not finite, and where in ``values`` the first of them is.
    """
    if not bool(torch.isfinite(values).all()):
        wrong = torch.nonzero(~torch.isfinite(values))
        raise NonFiniteError(f"{len(wrong)} of {values.numel()} values of {name} ({kind}) are not finite, the first at {wrong[0].tolist()}")
    return values
