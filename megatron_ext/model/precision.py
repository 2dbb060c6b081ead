"""Which linears of a model are quantized, and telling them so."""

import difflib
import re
from dataclasses import replace
from fnmatch import fnmatchcase

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import transformer_engine
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.parallel.tensor import DividedLinear, RowLinear
from megatron_ext.precision.linear import LinearPrecision
from megatron_ext.precision.recipe import LinearRecipe, Recipe
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.wire import Wire

LINEAR = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.\w+_proj\.weight")
"""Weights of the linears inside blocks."""


def linear_recipes(config: ModelConfig, recipe: Recipe) -> dict[str, LinearRecipe | None]:
    """The recipe of every linear inside the blocks of a model, by the name of its weight; None where it is not quantized.

    Raises:
        ConfigError: a pattern of names fits no linear, or a recipe that quantizes has nothing left to quantize.
    """
    layers = {name: int(match[1]) for name in parameter_shapes(config) if (match := LINEAR.fullmatch(name))}
    for pattern in recipe.options.high_precision_names:
        if not any(fnmatchcase(name, pattern) for name in layers):
            nearest = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.0)[0]
            raise ConfigError(f"precision.high_precision_names: {pattern!r} fits no linear of a block; nearest: {nearest}")
    found = {name: recipe.for_linear(name, layer, config.num_layers) for name, layer in layers.items()}
    if recipe.options.recipe != "bf16" and not any(found.values()):
        first, last = recipe.kept_layers(config.num_layers)
        raise ConfigError(
            f"precision.recipe is {recipe.options.recipe!r}, but in {config.num_layers} blocks nothing is left to quantize: the first "
            f"{first} and the last {last} are kept, and {recipe.options.high_precision_names}; accepted are smaller numbers for "
            "precision.high_precision_first and high_precision_last, or fewer names"
        )
    return found


def set_recipe(model: GPT, recipe: Recipe, state: PrecisionState) -> None:
    """Let the linears of ``model`` compute as ``recipe`` says, in the steps that ``state`` tells them of."""
    model.precision = state
    if recipe.options.communication is not None:
        _code_communication(model, recipe, Wire(recipe.options.communication, state))
    recipes = linear_recipes(model.config, recipe)
    for name, module in model.named_modules():
        found = recipes.get(f"{name}.weight")
        if found is None:
            continue
        assert isinstance(module, DividedLinear), "what is named so is one"
        if recipe.options.backend == "transformer_engine":
            module.accelerated = transformer_engine.Linear(module.weight, recipe.options.recipe)
            continue
        module.precision = LinearPrecision(
            f"{name}.weight",
            found,
            state,
            switched=recipe.after_switch(found),
            divided="inputs" if isinstance(module, RowLinear) else "outputs",
            start=module.split.start,
            group=model.tp.group,
            stash=recipe.options.stash,
            backend=recipe.options.backend,
        )


def _code_communication(model: GPT, recipe: Recipe, wire: Wire) -> None:
    """Let the blocks that are not kept in high precision send codes."""
    first, last = recipe.kept_layers(model.config.num_layers)
    for layer, block in model.model.layers.items():
        if first <= int(layer) < model.config.num_layers - last:
            for region in (block.self_attn, block.mlp):
                region.tp = replace(region.tp, wire=wire)
