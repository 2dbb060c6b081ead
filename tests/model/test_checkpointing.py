"""What backward computes again: with selective recomputation no matrix product, in whatever numbers it is."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.model.checkpointing import recomputed
from megatron_ext.precision.linear import LinearPrecision, quantized_linear
from megatron_ext.precision.options import PrecisionOptions, RecipeName
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState

PRODUCTS = ("mm", "addmm", "_scaled_mm", "_scaled_mm_v2")


class Counted(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        if (name := function.overloadpacket.__name__) in PRODUCTS:
            self.products[name] += 1
        return function(*arguments, **(options or {}))


def products(what: str, recipe: RecipeName, backend: str) -> tuple[int, list[Tensor]]:
    """Matrix products of forward and backward of a linear and a gate, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    found = Recipe(PrecisionOptions(recipe=recipe)).for_linear("model.layers.1.mlp.up_proj.weight", 1, 4)
    state = PrecisionState(seed=0)
    precision = None if found is None else LinearPrecision("up", found, state, backend=backend)

    def part(x: Tensor) -> Tensor:
        return F.silu(F.linear(x, weight) if precision is None else quantized_linear(x, weight, None, precision))

    with Counted() as counted:
        recomputed(what, part, x).float().square().sum().backward()
    return counted.products.total(), [x.grad, weight.grad]


@pytest.mark.parametrize(
    ("recipe", "backend"), [("bf16", "auto"), ("nvfp4", "emulated"), ("fp8_tensorwise", "native"), ("mxfp8", "emulated")]
)
def test_selective_recomputation_repeats_no_product(recipe: RecipeName, backend: str) -> None:
    counts, gradients = zip(*(products(what, recipe, backend) for what in ("none", "selective", "full")), strict=True)
    assert counts == (3, 3, 4)
    for gradient in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], gradient, strict=True))
