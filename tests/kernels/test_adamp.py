import math

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.adamp import AdamUpdate, adamp_moments, adamp_step, adamp_update
from megatron_ext.kernels.projection import as_rows

SHAPES = [(5, 3), (64, 100), (3, 1025), (2, 16385), (1, 40000), (8, 3, 3, 3), (17, 16), (300, 1), (33,), (40000,), (), (1, 1)]
"""Odd ones, and ones on both sides of the kernel's 16 lanes, blocks of 1024 and tiles of 16384."""


def tensors(seed: int = 0, scale: float = 1.0) -> list[list[Tensor]]:
    """Parameters, gradients and moments of all shapes. Of the matrices, by turns, rows, layer and nothing are projected."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    p, g, m, v = draw(), draw(), draw(), [x.square() for x in draw()]
    for number, (parameter, gradient) in enumerate(zip(p, g, strict=True)):
        rows, changed = as_rows(parameter), as_rows(gradient)
        if parameter.ndim > 1 and number % 3 == 0 and rows.shape[1] > 1:
            changed -= rows * ((changed * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))
        if parameter.ndim > 1 and number % 3 == 1 and len(rows) > 1:
            changed += rows * torch.linspace(-3, 3, len(rows))[:, None]
            changed -= rows * ((changed * rows).sum() / rows.square().sum())
        if number % 3 == 2:
            changed += rows
    return [p, [x * scale for x in g], [x * scale for x in m], [x * scale**2 for x in v]]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


RULE = {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_step_equals_the_definition_and_float64(nesterov: bool, scale: float) -> None:
    adam = AdamUpdate(7, nesterov=nesterov)
    kernel, plain = tensors(scale=scale), tensors(scale=scale)
    exact = [[x.double() for x in kind] for kind in tensors(scale=scale)]
    projection = adamp_step(*kernel, adam, **RULE, backend="cpu")
    adamp_step(*plain, adam, **RULE)
    expected = adamp_step(*exact, adam, **RULE)
    assert torch.equal(projection.channel, expected.channel) and torch.equal(projection.layer, expected.layer)
    assert not (projection.channel & projection.layer).any(), "rows come first"
    assert projection.channel.any() and projection.layer.any() and not (projection.channel | projection.layer).all()
    for kind in (0, 2, 3):
        for mine, definition, reference in zip(kernel[kind], plain[kind], exact[kind], strict=True):
            assert relative(mine, definition) < 1e-6 and relative(mine, reference) < 1e-6, (kind, mine.shape)


def test_changes_of_parameters_are_exact_too() -> None:
    """Beside parameters near zero, so that what is compared is the update and not the parameter."""
    small = tensors()
    small[0] = [x * 1e-3 for x in small[0]]
    exact = [[x.double() for x in kind] for kind in small]
    begin = [x.clone() for x in exact[0]]
    adamp_step(*small, AdamUpdate(3), **RULE, backend="cpu")
    adamp_step(*exact, AdamUpdate(3), **RULE)
    for mine, reference, old in zip(small[0], exact[0], begin, strict=True):
        assert relative(mine.double() - old, reference - old) < 1e-6, mine.shape


def test_row_sums_are_those_of_the_definition() -> None:
    mine = adamp_moments(*tensors(), AdamUpdate(7), backend="cpu")
    exact = adamp_moments(*([x.double() for x in kind] for kind in tensors()), AdamUpdate(7))
    assert mine.shape == exact.shape == (sum(len(torch.empty(s)) if len(s) > 1 else 1 for s in SHAPES), 4)
    lengths = exact[:, 1:3].sqrt().prod(1)
    assert ((mine[:, 0] - exact[:, 0]).abs() / lengths).max() < 1e-6
    torch.testing.assert_close(mine[:, 1:3], exact[:, 1:3], rtol=1e-6, atol=0)
    assert relative(mine[:, 3], exact[:, 3]) < 1e-6


def after_step(threads: int, instructions: str = "") -> list[Tensor]:
    """Everything that two passes change or return."""
    kinds = tensors()
    numbers = (0.9, 0.999, 1e-8, 0.3, False, threads, instructions)
    sums = torch.ops.megatron_ext.adamp_moments(*kinds, *numbers)
    coefficients = torch.linspace(-0.1, 0.1, len(sums), dtype=torch.float64)
    decays = torch.linspace(0.9, 1.0, len(SHAPES), dtype=torch.float64)
    torch.ops.megatron_ext.adamp_update(*kinds, *numbers, coefficients, decays, 0.1)
    return [sums, *kinds[0], *kinds[2], *kinds[3]]


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_no_bit(threads: int) -> None:
    assert all(torch.equal(a, b) for a, b in zip(after_step(1), after_step(threads), strict=True))


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_instruction_sets_change_no_bit(instructions: str) -> None:
    try:
        other = after_step(1, instructions)
    except ConfigError:
        pytest.skip(f"this CPU has no {instructions}")
    assert all(torch.equal(a, b) for a, b in zip(after_step(1), other, strict=True))


def test_unknown_instructions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no sse9 instructions"):
        after_step(1, "sse9")


def test_vectors_get_adamw() -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 37))
    p.grad = torch.linspace(3, 1, 37)
    reference = torch.nn.Parameter(p.detach().clone())
    reference.grad = p.grad
    torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1).step()
    adamp_step([p.detach()], [p.grad], [torch.zeros(37)], [torch.zeros(37)], AdamUpdate(1), **RULE, backend="cpu")
    torch.testing.assert_close(p, reference, rtol=1e-6, atol=1e-8)


def test_decisions_and_decay_are_per_matrix() -> None:
    """A matrix among others is treated as alone."""
    together = tensors()
    adamp_step(*together, AdamUpdate(2), **RULE, backend="cpu", threads=2)
    for number in range(len(SHAPES)):
        alone = [[kind[number]] for kind in tensors()]
        adamp_step(*alone, AdamUpdate(2), **RULE, backend="cpu")
        assert torch.equal(alone[0][0], together[0][number]), SHAPES[number]


def test_gradients_may_have_any_strides_but_parameters_not() -> None:
    p, g, m, v = torch.ones(4, 6), torch.randn(6, 4).t(), torch.zeros(4, 6), torch.zeros(4, 6)
    expected = torch.ones(4, 6)
    adamp_step([p], [g], [m], [v], AdamUpdate(1), **RULE, backend="cpu")
    adamp_step([expected], [g.contiguous()], [torch.zeros(4, 6)], [torch.zeros(4, 6)], AdamUpdate(1), **RULE, backend="cpu")
    assert torch.equal(p, expected)
    with pytest.raises(ConfigError, match="contiguous"):
        adamp_moments([p.t()], [g.t()], [m.t()], [v.t()], AdamUpdate(1), backend="cpu")


def test_autograd_notices_the_change() -> None:
    """A graph that needs the old values must refuse to go backward rather than use the new ones."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    loss = (weight * weight).sum()
    with torch.no_grad():
        adamp_step([weight], [torch.ones(2, 2)], [torch.zeros(2, 2)], [torch.zeros(2, 2)], AdamUpdate(1), **RULE, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_not_a_number_stays_in_its_matrix() -> None:
    kinds = tensors()
    kinds[1][1][3, 5] = math.nan
    adamp_step(*kinds, AdamUpdate(1), **RULE, backend="cpu")
    assert [bool(x.isfinite().all()) for x in kinds[0]] == [number != 1 for number in range(len(SHAPES))]


def test_parts_do_what_the_step_does() -> None:
    whole, parts, adam = tensors(), tensors(), AdamUpdate(4)
    projection = adamp_step(*whole, adam, **RULE, backend="cpu")
    adamp_moments(*parts, adam, backend="cpu")
    adamp_update(*parts, adam, projection.coefficients, projection.decays(0.01, 0.1, 0.1), 0.01 / adam.corrections[0], backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))
