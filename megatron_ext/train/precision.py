"""The training recipe of a run: what a model is told, and what the banner says of it."""

from megatron_ext.config import RunConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import linear_recipes, set_recipe
from megatron_ext.parallel.grid import Grid
from megatron_ext.precision.products import select_backends
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState


def apply_recipe(model: GPT, config: RunConfig, grid: Grid) -> dict[str, str]:
    """Make ``model`` compute by the recipe of ``config``; returns lines for the banner, none if nothing is quantized.

    Raises:
        ConfigError: native products are asked for, and this device has none.
    """
    options = config.precision
    recipe, state = Recipe(options), PrecisionState(config.seed, grid.dp.rank, options.switch_at_tokens)
    recipes = linear_recipes(model.config, recipe)
    quantized = [each for each in recipes.values() if each is not None]
    lines = {}
    if quantized:
        first, last = recipe.kept_layers(model.config.num_layers)
        blocks = f"; not in the first {first} and the last {last} of {model.config.num_layers} blocks" if first or last else ""
        names = f"; not {', '.join(options.high_precision_names)}" if options.high_precision_names else ""
        lines["precision"] = f"{recipe}: {len(quantized)} of {len(recipes)} linears of blocks{blocks}{names}"
        lines["  products"] = select_backends(quantized[0], options.backend, grid.world.device)
        if options.switch_at_tokens is not None:
            lines["  until"] = f"{options.switch_at_tokens:,} tokens, then {switch_target(config)}"
    set_recipe(model, recipe, state)
    return lines


def switch_target(config: RunConfig) -> str:
    """What the late switch leaves, in words."""
    return "forward in high precision" if config.precision.forward_only else "everything in high precision"
