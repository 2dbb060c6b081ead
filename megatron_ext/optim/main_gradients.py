"""Float32 gradients that accumulate over the packs of a step."""

from collections.abc import Callable, Mapping

import torch


class MainGradients:
    """Sum of the gradients of all packs of a step, in float32 (float64 for float64 parameters), by parameter name.

    A gradient of lower precision is added to a float32 tensor as soon as autograd has produced it, and released; gradients that are
    already float32 or float64 accumulate where autograd puts them.

    Args:
        parameters: by name; hooks are put on them.
        on_final: called with a name when its gradient has been accumulated in all of the step's backward passes.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], on_final: Callable[[str], None] | None = None) -> None:
        self._parameters = dict(parameters)
        self._sums: dict[str, torch.Tensor] = {}
        self._on_final = on_final
        self._expected: int | None = None
        self._accumulated = dict.fromkeys(self._parameters, 0)
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def expect(self, backwards: int | None) -> None:
        """Begin a step of this many backward passes. Autograd adds up all uses of a parameter before it accumulates: once in each pass."""
        self._expected = backwards
        self._accumulated = dict.fromkeys(self._parameters, 0)

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            if parameter.dtype not in (torch.float32, torch.float64):
                if name in self._sums:
                    self._sums[name].add_(parameter.grad)
                else:
                    self._sums[name] = parameter.grad.float()
                parameter.grad = None
            self._accumulated[name] += 1
            if self._accumulated[name] == self._expected and self._on_final is not None:
                self._on_final(name)

        return add

    def __getitem__(self, name: str) -> torch.Tensor:
        """The sum so far, shaped like the parameter; zeros if no pack of this rank reached it."""
        parameter = self._parameters[name]
        gradient = self._sums.get(name, parameter.grad)
        return torch.zeros_like(parameter, dtype=main_dtype(parameter.dtype)) if gradient is None else gradient

    def release(self, name: str) -> None:
        """Forget one gradient."""
        self._sums.pop(name, None)
        self._parameters[name].grad = None

    def clear(self) -> None:
        """Forget all gradients, at the end of a step."""
        for name in self._parameters:
            self.release(name)
        self.expect(None)


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of master weights, main gradients and moments of a parameter of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)
