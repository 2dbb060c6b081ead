"""Which linear is quantized how: defaults of recipes, every switch alone, what is kept, and what is refused."""

from dataclasses import fields, replace

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import linear_recipes, set_recipe
from megatron_ext.precision.options import PrecisionOptions, RecipeName
from megatron_ext.precision.recipe import Gemm, LinearRecipe, Operand, Recipe
from megatron_ext.precision.state import PrecisionState

MODEL = ModelConfig(51, 32, 48, 4, 4, 2, 8, 64)
NAME = "model.layers.2.mlp.up_proj.weight"
RECIPES: list[RecipeName] = ["fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4", "mxfp4"]


def linear(recipe: RecipeName, **switches: object) -> LinearRecipe:
    found = Recipe(PrecisionOptions(recipe=recipe, **switches)).for_linear(NAME, 2, 5)
    assert found is not None
    return found


def test_nvfp4_is_the_recipe_of_the_paper() -> None:
    x, weight = Operand("nvfp4"), Operand("nvfp4", square=True)
    gradient = Operand("nvfp4", stochastic=True)
    rotated = replace(x, transform=True), replace(gradient, transform=True)
    assert linear("nvfp4") == LinearRecipe(Gemm(x, weight), Gemm(gradient, weight), Gemm(rotated[1], rotated[0]))
    recipe = Recipe(PrecisionOptions(recipe="nvfp4"))
    assert recipe.kept_layers(62) == (2, 8) and recipe.kept_layers(4) == (1, 1)
    kept = [layer for layer in range(62) if recipe.for_linear(NAME, layer, 62) is None]
    assert kept == [0, 1, *range(54, 62)]


def test_mxfp4_differs_from_nvfp4_in_the_format_alone() -> None:
    def as_nvfp4(gemm: Gemm | None) -> Gemm:
        assert gemm is not None
        return Gemm(replace(gemm.a, format="nvfp4"), replace(gemm.b, format="nvfp4"))

    theirs = linear("mxfp4")
    assert LinearRecipe(*(as_nvfp4(getattr(theirs, field.name)) for field in fields(theirs))) == linear("nvfp4")


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8"])
def test_formats_of_eight_bits_use_no_random_numbers(recipe: RecipeName) -> None:
    found = linear(recipe)
    assert found.forward and found.input_gradient and found.weight_gradient
    operands = [operand for gemm in (found.forward, found.input_gradient, found.weight_gradient) for operand in (gemm.a, gemm.b)]
    assert not any(operand.stochastic or operand.transform for operand in operands)
    assert found.forward.b.square == found.input_gradient.b.square == (recipe == "fp8_blockwise")
    gradients = {found.input_gradient.a.dtype, found.weight_gradient.a.dtype}
    assert gradients == {torch.float8_e5m2 if recipe == "fp8_tensorwise" else torch.float8_e4m3fn}
    assert Recipe(PrecisionOptions(recipe=recipe)).kept_layers(62) == (0, 0)


@pytest.mark.parametrize(
    ("switch", "attribute", "gemms"),
    [
        ("weights_2d", "square", {"forward", "input_gradient"}),
        ("hadamard", "transform", {"weight_gradient"}),
        ("stochastic_rounding", "stochastic", {"input_gradient", "weight_gradient"}),
    ],
)
def test_a_switch_changes_its_own_operands(switch: str, attribute: str, gemms: set[str]) -> None:
    on, off = linear("nvfp4"), linear("nvfp4", **{switch: False})
    for name in ("forward", "input_gradient", "weight_gradient"):
        before, after = getattr(on, name), getattr(off, name)
        assert (before != after) == (name in gemms)
        sides = [
            (getattr(on_side, attribute), getattr(off_side, attribute))
            for on_side, off_side in zip(*map(vars_of, (before, after)), strict=True)
        ]
        assert not any(off_value for _, off_value in sides) and any(on_value for on_value, _ in sides) == (name in gemms)


def vars_of(gemm: Gemm) -> tuple[Operand, Operand]:
    return gemm.a, gemm.b


def test_products_are_chosen_one_by_one() -> None:
    found = linear("mxfp8", gemms=["input_gradient"])
    assert found.forward is None and found.weight_gradient is None and found.input_gradient is not None
    assert linear("fp8_rowwise", gradient_format="e5m2").input_gradient.a.dtype == torch.float8_e5m2


def test_layers_and_names_are_kept() -> None:
    options = PrecisionOptions(recipe="mxfp8", high_precision_first=1, high_precision_last=2, high_precision_names=["*.down_proj.weight"])
    found = linear_recipes(MODEL, Recipe(options))
    assert len(found) == 4 * 7
    quantized = {name for name, recipe in found.items() if recipe is not None}
    assert quantized == {name for name in found if ".layers.1." in name and "down_proj" not in name}
    model = GPT(MODEL)
    set_recipe(model, Recipe(options), PrecisionState(0))
    told = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "precision", None) and name}
    assert told == quantized


def test_bf16_leaves_every_linear_alone() -> None:
    model = GPT(MODEL)
    set_recipe(model, Recipe(PrecisionOptions()), PrecisionState(0))
    assert all(module.precision is None for name, module in model.named_modules() if name and hasattr(module, "precision"))
    assert set(linear_recipes(MODEL, Recipe(PrecisionOptions())).values()) == {None}


def test_the_late_switch() -> None:
    state = PrecisionState(0, switch_at_tokens=100)
    assert [state.begin_step(step, tokens) for step, tokens in ((1, 0), (2, 99), (3, 100), (4, 200))] == [False, False, True, False]
    whole = linear("nvfp4")
    assert not Recipe(PrecisionOptions(recipe="nvfp4", switch_at_tokens=1)).after_switch(whole).quantizes
    partly = Recipe(PrecisionOptions(recipe="nvfp4", switch_at_tokens=1, forward_only=True)).after_switch(whole)
    assert partly == replace(whole, forward=None) and partly.quantizes


def test_rounding_seeds_are_of_run_step_pack_rank_layer_and_operand() -> None:
    def seeds(seed: int, rank: int, step: int, packs: int) -> list[int]:
        state = PrecisionState(seed, rank)
        state.begin_step(step, 0)
        for _ in range(packs):
            state.next_pack()
        return [state.rounding_seed(layer, operand) for layer in ("a", "b") for operand in ("x", "y")]

    cases = [(0, 0, 1, 1), (1, 0, 1, 1), (0, 1, 1, 1), (0, 0, 2, 1), (0, 0, 1, 2)]
    found = [seed for case in cases for seed in seeds(*case)]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**63 for seed in found)
    assert seeds(*cases[0]) == seeds(*cases[0])


def test_signs_and_seed_go_on_in_a_resumed_run() -> None:
    first, other = PrecisionState(3), PrecisionState(4)
    assert not torch.equal(first.signs, other.signs) and first.signs.abs().eq(1).all()
    other.signs_for(torch.ones(1), 16)
    other.load(first.saved())
    assert torch.equal(other.signs, first.signs) and torch.equal(other.signs_for(torch.ones(1), 16), first.signs[:16])
    assert other.rounding_seed("a", "b") == first.rounding_seed("a", "b")
    other.load(None)
    assert other.seed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "fp8_rowwise", "weights_2d": True},
            "weights_2d: true; accepted: null or false with fp8_rowwise; true with nvfp4, mxfp4",
        ),
        ({"recipe": "mxfp8", "hadamard": True}, "hadamard: true; accepted: null or false with mxfp8; true with nvfp4 and mxfp4"),
        ({"recipe": "bf16", "stochastic_rounding": True}, "stochastic_rounding: true; accepted: null or false with bf16"),
        ({"recipe": "nvfp4", "gradient_format": "e5m2"}, "gradient_format: 'e5m2'; accepted: null with nvfp4"),
        ({"recipe": "nvfp4", "gemms": []}, "gemms: []; accepted: some of the three products"),
        ({"recipe": "nvfp4", "gemms": ["forward", "forward"]}, "gemms: "),
        ({"recipe": "nvfp4", "high_precision_last": -1}, "high_precision_last: -1; accepted: a number of blocks"),
        ({"recipe": "nvfp4", "switch_at_tokens": -1}, "switch_at_tokens: -1"),
        ({"recipe": "nvfp4", "forward_only": True}, "forward_only: true; accepted: false, because switch_at_tokens is null"),
        ({"recipe": "mxfp4", "backend": "native"}, "backend: 'native'; accepted: auto or emulated with mxfp4"),
        ({"recipe": "bf16", "backend": "native"}, "backend: 'native'; accepted: auto or emulated with bf16"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PrecisionOptions(**options)
    assert message in str(caught.value)


def test_a_recipe_that_quantizes_nothing_and_a_pattern_that_fits_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'nvfp4', but in 2 blocks nothing is left to quantize: the first 1 and the last 1 are kept"):
        linear_recipes(replace(MODEL, num_layers=2), Recipe(PrecisionOptions(recipe="nvfp4")))
    with pytest.raises(ConfigError, match=r"'\*\.wq\.weight' fits no linear of a block; nearest: model\.layers"):
        linear_recipes(MODEL, Recipe(PrecisionOptions(recipe="nvfp4", high_precision_names=["*.wq.weight"])))
