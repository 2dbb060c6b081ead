"""Float32 gradients that accumulate over the packs of a step."""

from collections.abc import Callable, Mapping

import torch


class MainGradients:
    """Sum of the gradients of all packs of a step, in float32 (float64 for float64 parameters), by parameter name.

    A gradient of lower precision is added to a float32 tensor as soon as autograd has produced it, and released; gradients that are
    already float32 or float64 accumulate where autograd puts them.

    Args:
        parameters: by name; hooks are put on those of lower precision.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._sums: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            if name in self._sums:
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

        return add

    def __getitem__(self, name: str) -> torch.Tensor:
        """The sum so far, shaped like the parameter; zeros if no pack of this rank reached it."""
        parameter = self._parameters[name]
        gradient = self._sums.get(name, parameter.grad)
        return torch.zeros_like(parameter, dtype=main_dtype(parameter.dtype)) if gradient is None else gradient

    def clear(self) -> None:
        """Forget all gradients, at the end of a step."""
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of master weights, main gradients and moments of a parameter of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)
