"""Norms by statistics of earlier steps against their definitions, step by step over all tokens at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.running_norm import RUNNING, PowerNorm, RunningNorm, StepMeans, UnifiedNorm

SIZE, STEPS, EPS = 5, 12, 1e-3
PACKS = (7, 0, 1, 13)
"""Tokens of each pack of a step."""
CONFIG = ModelConfig(37, 24, 40, 2, 6, 2, 4, 64, init_std=0.3)


@dataclass
class Power:
    """Algorithm 2 of Shen et al., its first steps with plain means."""

    square: Tensor = field(default_factory=lambda: torch.ones(SIZE, dtype=torch.float64))
    product: Tensor = field(default_factory=lambda: torch.zeros(SIZE, dtype=torch.float64))
    step: int = 0

    def __call__(self, x: Tensor, gain: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Result, gradient of ``x``, gradient of the gain; all of what is scaled already."""
        psi = (self.square + EPS).sqrt()
        hat, by_hat = x / psi, grad * gain
        result = hat * gain, (by_hat - self.product * hat) / psi, (grad * hat).sum(0)
        alpha = min(0.9, self.step / (self.step + 1))
        self.product = self.product * (1 - (1 - alpha) * (hat**2).mean(0)) + (1 - alpha) * (by_hat * hat).mean(0)
        self.square = alpha * self.square + (1 - alpha) * (x**2).mean(0)
        self.step += 1
        return result


@dataclass
class Unified:
    """Means over the last four steps; an outlier leaves the last one alone."""

    squares: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    outliers: int = 0

    def __call__(self, x: Tensor, gain: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Power``."""
        square, product = torch.ones(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
        if self.squares:
            last = torch.stack(self.squares[-4:])
            geometric = last.prod(0) ** (1 / len(last))
            outlier = last.mean(0) - geometric > 4 * geometric
            self.outliers += int(outlier.sum())
            square, product = torch.where(outlier, last[-1], geometric), torch.stack(self.products[-4:]).mean(0)
        hat, by_hat = x / (square + EPS).sqrt(), grad * gain
        self.squares.append((x**2).mean(0))
        self.products.append((by_hat * hat).mean(0))
        return hat * gain, (by_hat - product * hat) / (square + EPS).sqrt(), (grad * hat).sum(0)


def data() -> Iterator[tuple[Tensor, Tensor]]:
    """Values and gradients of the tokens of each step; one step has hardly any values in one channel."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        x, grad = (torch.randn(sum(PACKS), SIZE, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
        x[:, 2] *= 1e-4 if step == 6 else 1
        yield 2 * x, grad


def by_packs(norm: RunningNorm, x: Tensor, grad: Tensor, padding: int, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Power``: pack by pack, each with ``padding`` rows that are no tokens."""
    norm.weight.grad = None
    results, gradients = [], []
    for pack, of_pack in zip(x.split(PACKS), grad.split(PACKS), strict=True):
        rows = torch.cat([pack, torch.full((padding, SIZE), 9.0, dtype=torch.float64)]).requires_grad_()
        present = torch.arange(len(rows)) < len(pack)
        result = norm(rows, present if masked else None)
        result.backward(torch.cat([of_pack, torch.full((padding, SIZE), 3.0, dtype=torch.float64)]))
        assert not masked or not rows.grad[len(pack) :].any()
        results.append(result.detach()[: len(pack)])
        gradients.append(rows.grad[: len(pack)])
    return torch.cat(results), torch.cat(gradients), norm.weight.grad


@torch.no_grad()
def finish(norm: RunningNorm) -> None:
    """End a step; parameters change in parts, as their owners change them."""
    means = StepMeans(norm, norm.take_sums())
    for name in RUNNING:
        parameter = norm.get_parameter(name)
        for rows in (slice(0, 1), slice(1, 4), slice(4, len(parameter))):
            parameter[rows] = norm.updated(name, parameter[rows].clone(), slice(*rows.indices(len(parameter))[:2]), means)


def largest_error(kind: type[RunningNorm], definition: Power | Unified, padding: int = 0, masked: bool = False) -> float:
    """Over all steps, results and gradients, relative to the largest value."""
    norm = kind(SIZE, EPS).double()
    norm.weight.data = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)
    errors = []
    for x, grad in data():
        scaled = F.rms_norm(x.requires_grad_(), (SIZE,), None, EPS)
        result, of_scaled, of_gain = definition(scaled.detach(), norm.weight.detach(), grad)
        expected = result, torch.autograd.grad(scaled, x, of_scaled)[0], of_gain
        x = x.detach()
        found = by_packs(norm, x, grad, padding, masked)
        errors += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
        assert all(not norm.get_parameter(name).grad.any() for name in RUNNING)
        finish(norm)
    return max(errors)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("kind", "definition"), [(PowerNorm, Power), (UnifiedNorm, Unified)])
def test_steps_in_packs_equal_the_definition(kind: type[RunningNorm], definition: type[Power | Unified], padding: int) -> None:
    assert largest_error(kind, definition(), padding, masked=padding > 0) < 1e-10


@pytest.mark.parametrize(("kind", "definition"), [(PowerNorm, Power), (UnifiedNorm, Unified)])
def test_rows_that_are_no_tokens_would_be_seen(kind: type[RunningNorm], definition: type[Power | Unified]) -> None:
    assert largest_error(kind, definition(), padding=3, masked=False) > 1e-2


def test_an_outlier_is_met() -> None:
    definition = Unified()
    largest_error(UnifiedNorm, definition)
    assert 0 < definition.outliers < STEPS


@pytest.mark.parametrize("kind", ["power", "unified"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_pack_counts_once_where_activations_are_computed_again(kind: str, recompute: str) -> None:
    sums = []
    for what in ("none", recompute):
        model = GPT(replace(CONFIG, norm=NormOptions(kind, "peri", embedding_norm=True)), "dense", what)
        model.reset_parameters(0)
        tokens = torch.arange(12)
        loss, _ = model(tokens, tokens, torch.tensor([0, 12], dtype=torch.int32), 12, tokens, torch.ones(12))
        loss.backward()
        norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
        sums.append([norm.take_sums() for norm in norms])
    assert len(sums[0]) == 2 * 4 + 2
    assert all(torch.equal(one, other) and one[-1] == 12 for one, other in zip(*sums, strict=True))


@pytest.mark.parametrize("kind", ["power", "unified"])
def test_inside_a_step_documents_stay_apart(kind: str) -> None:
    model = GPT(replace(CONFIG, norm=NormOptions(kind)), "dense")
    model.reset_parameters(0)
    tokens, positions, boundaries = torch.arange(12), torch.arange(6).repeat(2), torch.tensor([0, 6, 12], dtype=torch.int32)
    before = model.logits(tokens, positions, boundaries, 6)
    tokens[2] = 30
    after = model.logits(tokens, positions, boundaries, 6)
    assert torch.equal(before[6:], after[6:]) and not torch.equal(before[2:6], after[2:6])
