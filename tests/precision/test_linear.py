"""The quantized linear: its three products against the recipe written out in float64, sharing, caching, and tensor parallelism."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.tensor import ColumnLinear, RowLinear, TensorParallel, outputs, single
from megatron_ext.parallel.world import World
from megatron_ext.precision import linear as linear_module
from megatron_ext.precision.linear import LinearPrecision, quantized_linear
from megatron_ext.precision.operands import Quantized, stripped
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.products import select_backends
from megatron_ext.precision.recipe import LinearRecipe, Recipe
from megatron_ext.precision.state import PrecisionState
from tests.distributed import RunRanks
from tests.precision import emulation

RECIPES = ["fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4", "mxfp4"]
SHAPES = [(48, 64, 32), (33, 40, 24), (1, 17, 5), (130, 150, 140)]
"""T, in, out: whole blocks, and sizes that no block divides."""


def recipe_of(options: PrecisionOptions) -> LinearRecipe:
    found = Recipe(options).for_linear("w", 2, 5)
    assert found is not None
    return found


def precision_of(options: PrecisionOptions, state: PrecisionState | None = None, **keys: Any) -> LinearPrecision:
    return LinearPrecision("w", recipe_of(options), state or started(), stash=options.stash, **keys)


def started() -> PrecisionState:
    state = PrecisionState(5)
    state.begin_step(3, 0)
    state.next_pack()
    return state


def tensors(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and dy with rows of other sizes, a row of zeros, and an outlier, of which quantizers make something."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))
    x, dy = x * torch.logspace(-1, 1, tokens)[:, None], dy * torch.logspace(-6, -4, tokens)[:, None]
    x[tokens // 2 : tokens // 2 + tokens // 30] = 0
    x[:1, :1] *= 8
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def computed(x: Tensor, weight: Tensor, dy: Tensor, precision: LinearPrecision) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = quantized_linear(x, weight, None, precision)
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    assert y.dtype == x.dtype and weight.grad.dtype == weight.dtype
    return [y.detach(), x.grad, weight.grad]


def errors(found: list[Tensor], expected: tuple[Tensor, ...]) -> list[float]:
    return [float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_and_gradients_are_those_of_the_recipe(recipe: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    options = PrecisionOptions(recipe=recipe)
    case, state = tensors(*shape, dtype), started()
    expected = emulation.linear(*case, options, state, "w")
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert max(errors(computed(*case, precision_of(options, state)), expected)) < rounding


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_rowwise"])
def test_native_products_are_those_of_the_recipe_where_a_cpu_has_them(recipe: str) -> None:
    options = PrecisionOptions(recipe=recipe, backend="native")
    assert select_backends(recipe_of(options), "native", torch.device("cpu")).startswith("native (")
    case, state = tensors(33, 40, 24), started()
    expected = emulation.linear(*case, options, state, "w")
    assert max(errors(computed(*case, precision_of(options, state, backend="native")), expected)) < 1e-6


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "fp8_blockwise"])
def test_native_products_are_refused_where_there_are_none(recipe: str) -> None:
    with pytest.raises(ConfigError, match=f"precision.backend: 'native'; accepted with {recipe} here: auto, emulated, because .*scaled_mm"):
        select_backends(recipe_of(PrecisionOptions(recipe=recipe)), "native", torch.device("cpu"))


SWITCHES = [
    ({"weights_2d": False}, "nvfp4", (True, True, False)),
    ({"hadamard": False}, "nvfp4", (False, False, True)),
    ({"stochastic_rounding": False}, "nvfp4", (False, True, True)),
    ({"weights_2d": False}, "mxfp4", (True, True, False)),
    ({"hadamard": False}, "mxfp4", (False, False, True)),
    ({"stochastic_rounding": False}, "mxfp4", (False, True, True)),
    ({"weights_2d": False}, "fp8_blockwise", (True, True, False)),
    ({"power_of_two_scales": True}, "fp8_rowwise", (True, True, True)),
    ({"gradient_format": "e4m3"}, "fp8_tensorwise", (False, True, True)),
    ({"gradient_format": "e5m2"}, "mxfp8", (False, True, True)),
    ({"gemms": ["forward", "input_gradient"]}, "nvfp4", (False, False, True)),
    ({"gemms": ["weight_gradient"]}, "fp8_rowwise", (True, True, False)),
]


@pytest.mark.parametrize(("switch", "recipe", "moves"), SWITCHES, ids=[f"{recipe}-{next(iter(switch))}" for switch, recipe, _ in SWITCHES])
def test_the_comparison_notices_every_switch(switch: dict[str, Any], recipe: str, moves: tuple[bool, ...]) -> None:
    case, state = tensors(130, 160, 140), started()
    on, off = PrecisionOptions(recipe=recipe), PrecisionOptions(recipe=recipe, **switch)
    expected = emulation.linear(*case, off, state, "w")
    assert max(errors(computed(*case, precision_of(off, state)), expected)) < 1e-6, "as switched"
    assert [error > 1e-3 for error in errors(computed(*case, precision_of(on, state)), expected)] == list(moves), "not switched"


def test_another_step_pack_or_layer_rounds_otherwise_and_without_bias() -> None:
    x, weight, dy = tensors(64, 32, 48)
    options = PrecisionOptions(recipe="nvfp4")
    state = started()
    gradients = []
    for step in range(1, 65):
        state.begin_step(step, 0)
        gradients.append(computed(x, weight, dy, precision_of(options, state))[2])
    nearest = computed(x, weight, dy, precision_of(replace(options, stochastic_rounding=False)))[2]
    assert all(not torch.equal(gradients[0], other) for other in gradients[1:])
    # x itself is rounded to nearest in all: the mean goes to the product with that x.
    columns = emulation.quantized_rows(x.T, "nvfp4", signs=state.signs[:16])
    exact = emulation.rotate(dy.double().T, state.signs[:16]) @ columns.T
    mean = torch.stack(gradients).double().mean(0)
    one, many, never = (float((value.double() - exact).norm() / exact.norm()) for value in (gradients[0], mean, nearest))
    assert many < one / 5 and many < never / 3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0, 32, 16), (1, 1, 1), (17, 3, 5)], ids=str)
def test_no_tokens_and_odd_sizes(recipe: str, shape: tuple[int, int, int]) -> None:
    x, weight, dy = tensors(*shape)
    bias = torch.ones(shape[2], requires_grad=True)
    x.requires_grad_()
    weight.requires_grad_()
    y = quantized_linear(x[None], weight, bias, precision_of(PrecisionOptions(recipe=recipe)))
    y.backward(dy[None])
    assert y.shape == (1, shape[0], shape[2]) and x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert torch.equal(bias.grad, dy.sum(0))
    assert y.isfinite().all() and x.grad.isfinite().all() and weight.grad.isfinite().all()
    if shape[0] == 0:
        assert not weight.grad.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_kept_as_codes_or_as_they_were_or_computed_again_inputs_give_the_same_bits(recipe: str) -> None:
    case = tensors(40, 48, 32, torch.bfloat16)
    first = computed(*case, precision_of(PrecisionOptions(recipe=recipe)))
    second = computed(*case, precision_of(PrecisionOptions(recipe=recipe, stash=False)))
    x, weight = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    precision = precision_of(PrecisionOptions(recipe=recipe))
    y = checkpoint(lambda x: quantized_linear(x * 1, weight, None, precision), x, use_reentrant=False)
    precision.state.next_pack()
    y.backward(case[2])
    third = [y.detach(), x.grad, weight.grad]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_what_is_kept_for_backward_is_codes() -> None:
    kept: list[Tensor] = []
    x, weight, _ = tensors(64, 128, 32, torch.bfloat16)
    weight.requires_grad_()
    for stash in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            quantized_linear(x, weight, None, precision_of(PrecisionOptions(recipe="nvfp4", stash=stash)))
        bits = sum(8 * tensor.nbytes for tensor in kept) / x.numel()
        assert bits == pytest.approx(4.5, abs=0.01) if stash else bits == 16


class Counted:
    """Counts what is quantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        plain = linear_module.quantize

        def counting(x: Tensor, *arguments: Any) -> Any:
            if any(operand is not None for operand in arguments[:2]):
                self.shapes.append(tuple(x.shape))
            return plain(x, *arguments)

        monkeypatch.setattr(linear_module, "quantize", counting)


@pytest.mark.parametrize("stash", [True, False])
def test_weights_are_quantized_once_a_step_and_inputs_once_for_all_linears(monkeypatch: pytest.MonkeyPatch, stash: bool) -> None:
    counted, state, tp = Counted(monkeypatch), started(), single()
    options = PrecisionOptions(recipe="nvfp4", stash=stash)
    linears = [ColumnLinear(24, tp.rows(size)) for size in (16, 8, 8)]
    for number, each in enumerate(linears):
        each.precision = LinearPrecision(str(number), recipe_of(options), state, stash=stash)
    for _ in range(2):
        sum(y.sum() for y in outputs(torch.randn(5, 24, requires_grad=True), *linears)).backward()
    assert counted.shapes.count((5, 24)) == (2 if stash else 4), "inputs: in forward, and without codes once more for columns"
    weights = [counted.shapes.count((size, 24)) for size in (16, 8)]
    assert weights == [1, 2], "once each, not once a pack"
    before = linears[0](torch.ones(5, 24))
    with torch.no_grad():
        linears[0].weight.mul_(2)
    assert torch.equal(linears[0](torch.ones(5, 24)), before)
    state.end_step()
    assert torch.equal(linears[0](torch.ones(5, 24)), 2 * before)


def test_after_the_late_switch_a_linear_is_that_of_pytorch_or_only_its_backward_is_quantized() -> None:
    case = tensors(40, 48, 32, torch.bfloat16)
    x, weight = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    expected = F.linear(x, weight)
    expected.backward(case[2])
    quantized = computed(*case, precision_of(PrecisionOptions(recipe="nvfp4"), started()))
    for forward_only in (False, True):
        options = PrecisionOptions(recipe="nvfp4", switch_at_tokens=10, forward_only=forward_only)
        state = PrecisionState(5, switch_at_tokens=10)
        precision = precision_of(options, state, switched=Recipe(options).after_switch(recipe_of(options)))
        results = []
        for tokens in (9, 10):
            state.begin_step(3, tokens)
            state.next_pack()
            results.append(computed(*case, precision))
        assert all(map(torch.equal, results[0], quantized))
        assert torch.equal(results[1][0], expected)
        for mine, plain, narrow in zip(results[1][1:], (x.grad, weight.grad), quantized[1:], strict=True):
            assert torch.equal(mine, narrow if forward_only else plain)


def codes_of(quantized: Quantized | None) -> list[Tensor]:
    assert quantized is not None
    return [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in stripped(quantized)[0]]


def rows_of(whole: Tensor, part: Tensor, place: int, size: int) -> bool:
    """Whether ``part`` is part ``place`` of ``size`` of the rows, or of the columns, of ``whole``, or all of it."""
    if whole.shape == part.shape:
        return torch.equal(whole, part)
    dimension = 0 if whole.shape[0] != part.shape[0] else 1
    return torch.equal(whole.chunk(size, dimension)[place], part)


def region(tp: TensorParallel, options: PrecisionOptions, reduces: bool = True) -> tuple[list[bool], list[Tensor]]:
    """Whether all codes of a column-divided and a row-divided linear are those of the whole, and their results and gradients."""
    inputs, middle, tokens = 128, 256, 48
    x, first, _ = tensors(tokens, inputs, middle)
    h, second, dy = tensors(tokens, middle, inputs)
    h, second = h.flip(1), second.flip(1)
    group = tp.group if reduces else None
    recipe = recipe_of(options)
    column, row = ColumnLinear(inputs, tp.rows(middle)), RowLinear(tp.rows(middle), inputs)
    part = slice(column.split.start, column.split.stop)
    with torch.no_grad():
        column.weight.copy_(first[part])
        row.weight.copy_(second[:, part])
    column.precision = LinearPrecision("a", recipe, started(), divided="outputs", start=part.start, group=group)
    row.precision = LinearPrecision("b", recipe, started(), divided="inputs", start=part.start, group=group)
    whole = [LinearPrecision(name, recipe, started()) for name in "ab"]
    x_by, dy_by = (recipe.forward.a, recipe.weight_gradient.b), (recipe.input_gradient.a, recipe.weight_gradient.a)
    ours, theirs = (column.precision, row.precision), whole
    pairs = [
        (ours[0].weight(column.weight), theirs[0].weight(first)),
        (ours[1].weight(row.weight), theirs[1].weight(second)),
        (ours[0].input(x, *x_by), theirs[0].input(x, *x_by)),
        (ours[1].input(h[:, part], *x_by), theirs[1].input(h, *x_by)),
        (ours[0].gradient(h[:, part], *dy_by, 9), theirs[0].gradient(h, *dy_by, 9)),
        (ours[1].gradient(dy, *dy_by, 9), theirs[1].gradient(dy, *dy_by, 9)),
    ]
    same = [
        rows_of(all_of_it, mine, tp.group.rank, tp.group.size)
        for pair in pairs
        for parted, entire in zip(*pair, strict=True)
        for mine, all_of_it in zip(codes_of(parted), codes_of(entire), strict=True)
    ]
    shard = x.chunk(tp.group.size)[tp.group.rank] if tp.shard_tokens else x
    shard = shard.clone().requires_grad_()
    y = tp.leave(row(column(tp.enter(shard, tokens))))
    y.backward(dy.chunk(tp.group.size)[tp.group.rank] if tp.shard_tokens else dy)
    return same, [y.detach(), shard.grad, column.weight.grad, row.weight.grad]


def divided_region(world: World, options: PrecisionOptions, shard_tokens: bool, reduces: bool) -> tuple[list[bool], list[Tensor]]:
    return region(TensorParallel(Grid(world, GridShape(1, 1, world.size)).tp, shard_tokens), options, reduces)


def distance(parts: list[Tensor], whole: Tensor, dimension: int | None) -> float:
    together = parts[0] if dimension is None else torch.cat(parts, dimension)
    return float((together - whole).norm() / whole.norm())


@pytest.mark.parametrize("shard_tokens", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_parts_have_the_codes_of_the_whole(run_ranks: RunRanks, recipe: str, shard_tokens: bool) -> None:
    options = PrecisionOptions(recipe=recipe)
    _, expected = region(single(), options)
    found = run_ranks(2, divided_region, options, shard_tokens, True)
    assert all(all(same) and len(same) > 10 for same, _ in found)
    dimensions = (0 if shard_tokens else None, 0 if shard_tokens else None, 0, 1)
    for number, dimension in enumerate(dimensions):
        assert distance([results[number] for _, results in found], expected[number], dimension) < 1e-6, number


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_tensorwise", "fp8_rowwise"])
def test_without_the_reduction_codes_of_parts_differ(run_ranks: RunRanks, recipe: str) -> None:
    found = run_ranks(2, divided_region, PrecisionOptions(recipe=recipe), False, False)
    assert not all(same for rank, _ in found for same in rank)
