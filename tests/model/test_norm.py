"""RMSNorm against PyTorch's and transformers'."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_ext.model.norm import RMSNorm, rms_norm


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (33, 3, 8), (0, 8), (2, 257)])
def test_values_and_gradients_equal_autograd_of_the_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, weight = inputs(shape, dtype)
    grad = torch.randn(shape, dtype=dtype)
    ours = rms_norm(x, weight, 1e-3)
    theirs = F.rms_norm(x, (shape[-1],), weight, 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True):
        torch.testing.assert_close(mine, reference, rtol=10 * tolerance, atol=10 * tolerance)


def test_gradcheck() -> None:
    x, weight = inputs((3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_bfloat16_rounds_where_transformers_rounds() -> None:
    x, weight = inputs((64, 48), torch.bfloat16)
    theirs = LlamaRMSNorm(48, 1e-6).to(torch.bfloat16)
    theirs.weight.data.copy_(weight)
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == torch.bfloat16
    # The two float32 statistics differ in their last bit, which moves a rounding now and then.
    assert (ours == theirs(x)).float().mean() > 0.99


def test_bfloat16_gradients_are_rounded_once() -> None:
    x, weight = inputs((64, 48), torch.bfloat16)
    grad = torch.randn(64, 48).bfloat16()
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grad)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(rms_norm(exact_x, exact_weight, 1e-6), (exact_x, exact_weight), grad.double())
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=2**-8, atol=1e-5)


def test_module_starts_at_one_and_keeps_its_epsilon() -> None:
    norm = RMSNorm(4, 0.5)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(norm(x), x / 1.5**0.5)
