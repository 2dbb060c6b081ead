import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.adamp import AdamUpdate, adamp_moments, adamp_speculate, adamp_step, adamp_update
from megatron_ext.kernels.projection import as_rows
from tests.kernels.triton_programs import run_program

SHAPES = [(5, 3), (64, 100), (3, 1025), (2, 16385), (1, 40000), (8, 3, 3, 3), (17, 16), (300, 1), (33,), (40000,), (), (1, 1)]
"""Odd ones, and ones on both sides of the kernel's 16 lanes, blocks of 1024 and tiles of 16384."""


SMALLER_SHAPES = [(5, 3), (64, 100), (3, 1025), (2, 2049), (1, 5000), (8, 3, 3, 3), (17, 16), (300, 1), (33,), (5000,), (), (1, 1)]
"""For Triton's interpreter, on both sides of the tiles of 2048."""


def tensors(seed: int = 0, scale: float = 1.0, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    """Parameters, gradients and moments of all shapes. Of the matrices, by turns, rows, layer and nothing are projected."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in shapes]

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
    sums = torch.ops.megatron_ext.adamp_first(*kinds, *numbers, -0.01, -0.1)
    changes = torch.linspace(-0.1, 0.1, 2 * len(sums), dtype=torch.float64).view(-1, 2)
    torch.ops.megatron_ext.adamp_second(*kinds, *numbers, changes)
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_parts_do_what_the_step_does(nesterov: bool) -> None:
    """With the same bits where nothing is projected; what is projected was rounded once more."""
    whole, parts, begin, adam = tensors(), tensors(), tensors(), AdamUpdate(4, nesterov=nesterov)
    projection = adamp_step(*whole, adam, **RULE, backend="cpu")
    adamp_moments(*parts, adam, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(parts[0], begin[0], strict=True)), "moments change no parameter"
    adamp_update(*parts, adam, projection.coefficients, projection.decays(0.01, 0.1, 0.1), 0.01 / adam.corrections[0], backend="cpu")
    for mine, expected, projected in zip(whole[0], parts[0], projection.channel | projection.layer, strict=True):
        assert torch.equal(mine, expected) or (projected and relative(mine, expected) < 2**-23), mine.shape
    assert all(torch.equal(a, b) for kind in (2, 3) for a, b in zip(whole[kind], parts[kind], strict=True))


def test_speculation_without_correction_is_no_step() -> None:
    """The comparisons above would notice a correction that did nothing."""
    whole, speculated, adam = tensors(), tensors(), AdamUpdate(4)
    projection = adamp_step(*whole, adam, **RULE, backend="cpu")
    sums = adamp_speculate(*speculated, adam, **RULE, backend="cpu")
    assert torch.equal(sums, adamp_moments(*tensors(), adam, backend="cpu")), "sums are from before the update"
    projected = (projection.channel | projection.layer).tolist()
    assert [not torch.equal(a, b) for a, b in zip(whole[0], speculated[0], strict=True)] == projected
    errors = [relative(a, b) for a, b, p in zip(speculated[0], whole[0], projected, strict=True) if p]
    assert len(errors) >= 4 and min(errors) > 5e-4


def test_decay_too_strong_to_correct_is_decided_first() -> None:
    """With a decay that leaves nothing of the parameters, too."""
    for lr, weight_decay in ((0.5, 2.0), (0.1, 5.1)):
        mine, exact = tensors(), [[x.double() for x in kind] for kind in tensors()]
        adamp_step(*mine, AdamUpdate(2), lr=lr, weight_decay=weight_decay, backend="cpu")
        adamp_step(*exact, AdamUpdate(2), lr=lr, weight_decay=weight_decay)
        assert max(relative(a, b) for a, b in zip(mine[0], exact[0], strict=True)) < 1e-6
        with pytest.raises(ConfigError, match="at most 0.5"):
            adamp_speculate(*mine, AdamUpdate(2), lr=lr, weight_decay=weight_decay)


def test_unknown_and_unusable_backends_are_refused() -> None:
    for backend, message in (("cuda", "accepted are cpu, triton"), ("torch", "accepted are cpu, triton"), ("triton", "a CUDA device")):
        with pytest.raises(ConfigError, match=message):
            adamp_speculate(*tensors(), AdamUpdate(1), lr=0.1, backend=backend)
    with pytest.raises(ConfigError, match="accepted are"):
        adamp_moments(*tensors(), AdamUpdate(1), backend="fused")


def check_step_in_triton() -> None:
    """Like the C++ kernel and like float64."""
    for nesterov in (False, True):
        adam = AdamUpdate(7, nesterov=nesterov)
        triton, cpu, exact = (tensors(shapes=SMALLER_SHAPES) for _ in range(3))
        exact = [[x.double() for x in kind] for kind in exact]
        projections = [
            adamp_step(*kinds, adam, **RULE, backend=name) for kinds, name in ((triton, "triton"), (cpu, "cpu"), (exact, "torch"))
        ]
        assert all(torch.equal(p.channel, projections[2].channel) and torch.equal(p.layer, projections[2].layer) for p in projections)
        assert projections[2].channel.any() and projections[2].layer.any()
        assert relative(projections[0].coefficients, projections[2].coefficients) < 1e-6
        for kind in (0, 2, 3):
            for mine, other, reference in zip(triton[kind], cpu[kind], exact[kind], strict=True):
                assert max(relative(mine, other), relative(mine, reference)) < 1e-6, (kind, mine.shape)


def check_parts_in_triton() -> None:
    """Sums as in float64, parameters left alone by the first part, and the bits of the step where nothing is projected."""
    adam = AdamUpdate(7)
    whole, parts, begin = (tensors(shapes=SMALLER_SHAPES) for _ in range(3))
    projection = adamp_step(*whole, adam, **RULE, backend="triton")
    sums = adamp_moments(*parts, adam, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(parts[0], begin[0], strict=True))
    exact = adamp_moments(*([x.double() for x in kind] for kind in begin), adam)
    assert sums.dtype == torch.float64 and relative(sums, exact) < 1e-6
    decays = projection.decays(RULE["lr"], RULE["weight_decay"], 0.1)
    adamp_update(*parts, adam, projection.coefficients, decays, RULE["lr"] / adam.corrections[0], backend="triton")
    for mine, expected, projected in zip(whole[0], parts[0], projection.channel | projection.layer, strict=True):
        assert torch.equal(mine, expected) or (projected and relative(mine, expected) < 2**-23), mine.shape


def check_strides_and_versions_in_triton() -> None:
    """Addresses that are no multiple of 16 bytes, gradients of any strides, and autograd, which must notice."""
    p, v = torch.linspace(-1, 1, 25)[1:].view(4, 6), torch.ones(25)[1:].view(4, 6)
    assert p.data_ptr() % 16 and p.is_contiguous()
    g, m, before = torch.linspace(-1, 2, 24).view(6, 4).t(), torch.zeros(4, 6), p._version
    expected = [x.double() for x in (p, g, m, v)]
    adamp_step([p], [g], [m], [v], AdamUpdate(3), **RULE, backend="triton")
    adamp_step(*([x] for x in expected), AdamUpdate(3), **RULE)
    assert max(relative(a, b) for a, b in zip((p, g, m, v), expected, strict=True)) < 1e-6
    assert p._version > before
    with pytest.raises(ConfigError, match="not .* torch.float64"):
        adamp_step(*([x] for x in expected), AdamUpdate(3), **RULE, backend="triton")


@pytest.mark.parametrize(
    "check", [check_step_in_triton, check_parts_in_triton, check_strides_and_versions_in_triton], ids=lambda check: check.__name__
)
def test_triton_twin_in_the_interpreter(check: Callable[[], None]) -> None:
    run_program(check, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_on_a_gpu() -> None:
    """Also that nothing waits for the device, after the first step, which makes tables."""
    for steps in (1, 7):
        there, exact = ([[x.to(**to) for x in kind] for kind in tensors()] for to in ({"device": "cuda"}, {"dtype": torch.float64}))
        torch.cuda.set_sync_debug_mode("default" if steps == 1 else "error")
        projection = adamp_step(*there, AdamUpdate(steps), **RULE, backend="triton")
        torch.cuda.set_sync_debug_mode("default")
        expected = adamp_step(*exact, AdamUpdate(steps), **RULE)
        assert torch.equal(projection.layer.cpu(), expected.layer) and torch.equal(projection.channel.cpu(), expected.channel)
        for kind in (0, 2, 3):
            assert all(relative(mine.cpu(), reference) < 1e-6 for mine, reference in zip(there[kind], exact[kind], strict=True))
