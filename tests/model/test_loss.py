"""The fused head and cross-entropy against PyTorch's, and its chunks."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model import loss as loss_module
from megatron_ext.model.loss import linear_cross_entropy
from tests.peak_memory import peak_bytes

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(tokens: int, vocab: int, dtype: torch.dtype, width: int = 6) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    loss_weight = torch.rand(tokens, generator=generator)
    loss_weight[::3] = 0
    return hidden, weight, labels, loss_weight


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return (losses * loss_weight).sum(), losses.detach() * (loss_weight != 0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four tokens, so that a few tokens make several and the last is not full."""
    monkeypatch.setattr(loss_module, "SMALLEST_CHUNK", 4)
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", {"cpu": 1})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 5), (2, 1), (23, 11), (4, 7), (0, 5)])
def test_equals_autograd_of_the_plain_formula(tokens: int, vocab: int, dtype: torch.dtype, tolerance: float) -> None:
    arguments = make(tokens, vocab, dtype)
    ours, our_losses = linear_cross_entropy(*arguments)
    theirs, their_losses = plain(*arguments)
    assert ours.dtype == our_losses.dtype == dtype
    torch.testing.assert_close(ours, theirs.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_losses, their_losses, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(-3.0 * loss, arguments[:2]) for loss in (ours, theirs)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck() -> None:
    hidden, weight, labels, loss_weight = make(9, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, loss_weight)[0], (hidden, weight))


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_that_is_needed(needed: int) -> None:
    arguments = list(make(9, 5, torch.float64))
    expected = torch.autograd.grad(linear_cross_entropy(*arguments)[0], arguments[needed])[0]
    arguments[1 - needed] = arguments[1 - needed].detach()
    assert torch.equal(torch.autograd.grad(linear_cross_entropy(*arguments)[0], arguments[needed])[0], expected)


def test_without_gradients_the_loss_is_the_same() -> None:
    arguments = make(9, 5, torch.float32)
    expected = linear_cross_entropy(*arguments)
    with torch.no_grad():
        total, losses = linear_cross_entropy(*arguments)
    assert not total.requires_grad
    assert torch.equal(total, expected[0])
    assert torch.equal(losses, expected[1])


def test_tokens_of_weight_zero_may_hold_anything() -> None:
    hidden, weight, labels, loss_weight = make(9, 5, torch.float64)
    expected, expected_losses = linear_cross_entropy(hidden, weight, labels, loss_weight)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    broken = hidden.detach().clone()
    broken[loss_weight == 0] = float("nan")
    broken.requires_grad_()
    total, losses = linear_cross_entropy(broken, weight, labels.where(loss_weight != 0, -100), loss_weight)
    assert torch.equal(total, expected)
    assert torch.equal(losses, expected_losses)
    for mine, reference in zip(torch.autograd.grad(total, (broken, weight)), expected_grads, strict=True):
        assert torch.equal(mine, reference)
    assert not expected_grads[0][loss_weight == 0].any()


def test_all_weights_zero() -> None:
    hidden, weight, labels, _ = make(9, 5, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, labels, torch.zeros(9))
    total.backward()
    assert total == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    total, losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]), torch.ones(2))
    total.backward()
    assert losses.tolist() == [2000.0, 0.0]
    assert torch.isfinite(hidden.grad).all()


def test_bfloat16_keeps_statistics_in_float32() -> None:
    """Over 400 tokens the float32 sums of the weight's gradient lose nothing but the rounding of each chunk."""
    hidden, weight, labels, loss_weight = make(400, 50, torch.bfloat16, width=16)
    total, losses = linear_cross_entropy(hidden, weight, labels, loss_weight)
    assert total.dtype == losses.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact_total, _ = plain(*exact, labels, loss_weight.double())
    assert total.item() == pytest.approx(exact_total.item(), rel=2e-3)
    for mine, reference in zip(torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(exact_total, exact), strict=True):
        assert (mine.double() - reference).norm() < 0.01 * reference.norm()


def largest_temporary(function: Callable[[], object]) -> int:
    """Bytes of the largest single allocation of ``function``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.cpu_memory_usage for event in profile.events())


def test_the_logits_of_a_pack_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(2048, 512, torch.float32)
    whole = 2048 * 512 * 4
    assert largest_temporary(lambda: plain(*arguments)) >= whole
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", {"cpu": 1})
    assert largest_temporary(lambda: loss_module.linear_cross_entropy(*arguments)) <= whole // 4


@pytest.mark.parametrize("tile", [1, 3, 5, 100])
def test_tiles_equal_the_whole(tile: int) -> None:
    arguments = make(23, 11, torch.float64)
    results = []
    for total, losses in (linear_cross_entropy(*arguments, tile=tile), plain(*arguments)):
        results.append([total, losses, *torch.autograd.grad(total, arguments[:2])])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_smaller_tiles_need_less_memory() -> None:
    arguments = make(4096, 256, torch.float64)
    logits = 4096 * 256 * 8

    def step(tile: int) -> int:
        return peak_bytes(lambda: linear_cross_entropy(*arguments, tile=tile)[0].backward())

    assert peak_bytes(lambda: plain(*arguments)[0].backward()) > 2 * logits
    assert step(64) < logits / 8 < step(4096) / 8
