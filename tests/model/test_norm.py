"""Norms against PyTorch's and transformers'."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_ext.kernels import norm as kernel
from megatron_ext.model.norm import CRMSNorm, LayerNorm, RMSNorm, SSNorm

rms_norm = partial(kernel.rms_norm, backend="torch")


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (33, 3, 8), (0, 8), (2, 257)])
def test_one_gain_is_a_factor_of_the_norm_without_gains(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, _ = inputs(shape, dtype)
    norm = SSNorm(shape[-1], 1e-6).to(dtype)
    norm.weight.data.fill_(1.7)
    gain = norm.weight.detach().clone().requires_grad_()
    grad = torch.randn(shape, dtype=dtype)
    ours, theirs = norm(x), F.rms_norm(x, (shape[-1],), None, 1e-6) * gain
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    mine, reference = (torch.autograd.grad(y, (x, g), grad) for y, g in ((ours, norm.weight), (theirs, gain)))
    torch.testing.assert_close(mine[0], reference[0], rtol=20 * tolerance, atol=20 * tolerance)
    torch.testing.assert_close(mine[1], reference[1], rtol=20 * tolerance, atol=20 * tolerance * x.numel() ** 0.5)


def test_one_gain_starts_at_one_and_its_gradient_is_that_of_differences() -> None:
    x, _ = inputs((3, 2, 4), torch.float64)
    assert torch.equal(SSNorm(4, 1e-6).weight, torch.ones(1))
    weight = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_one_gain_is_not_a_gain_for_each_channel() -> None:
    x, weight = inputs((7, 5), torch.float64)
    assert (rms_norm(x, weight, 1e-6) - rms_norm(x, weight.mean()[None], 1e-6)).abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 7, 64])
def test_crms_is_rms_with_the_channel_that_makes_the_sum_zero(size: int) -> None:
    x, _ = inputs((9, size), torch.float64)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)
    expected = F.rms_norm(whole, (size + 1,), None, 1e-3)[:, :size]
    torch.testing.assert_close(CRMSNorm(size, 1e-3).double()(x), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_is_that_of_pytorch(dtype: torch.dtype) -> None:
    x, weight = inputs((9, 16), dtype)
    ours, theirs = LayerNorm(16, 1e-3).to(dtype), torch.nn.LayerNorm(16, 1e-3, dtype=dtype)
    theirs.load_state_dict({"weight": weight, "bias": weight.flip(0)})
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("kind", [RMSNorm, SSNorm, CRMSNorm, LayerNorm])
def test_a_factor_multiplies_the_result_and_every_gradient(kind: type[RMSNorm]) -> None:
    x, _ = inputs((9, 16), torch.float64)
    plain, scaled = kind(16, 1e-3).double(), kind(16, 1e-3, factor=0.25).double()
    grad = torch.randn(9, 16, dtype=torch.float64)
    results = [(y := norm(x), *torch.autograd.grad(y, [x, *norm.parameters()], grad)) for norm in (plain, scaled)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, 0.25 * one, rtol=1e-13, atol=1e-14)
