"""The training recipe of a run: what a model is told, and what the banner says of it."""

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import transformer_engine
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import linear_recipes, set_recipe
from megatron_ext.parallel.grid import Grid
from megatron_ext.precision.products import select_backends
from megatron_ext.precision.recipe import LinearRecipe, Recipe
from megatron_ext.precision.state import PrecisionState


def apply_recipe(model: GPT, config: RunConfig, grid: Grid) -> dict[str, str]:
    """Make ``model`` compute by the recipe of ``config``; returns lines for the banner, none if nothing is quantized.

    Raises:
        ConfigError: what is asked for to compute products cannot run here.
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
        lines["  products"] = _products(config, quantized[0], grid)
    if options.communication is not None:
        lines["communication"] = f"{options.communication} codes of what tensor- and sequence-parallel ranks hand on, sums as they are"
    if lines and options.switch_at_tokens is not None:
        lines["  until"] = f"{options.switch_at_tokens:,} tokens, then {switch_target(config)}"
    set_recipe(model, recipe, state)
    return lines


def _products(config: RunConfig, recipe: LinearRecipe, grid: Grid) -> str:
    """What computes the products, for people."""
    options = config.precision
    if options.backend != "transformer_engine":
        return select_backends(recipe, options.backend, grid.world.device)
    reason = transformer_engine.recipe_obstacle(options.recipe, grid.world.device)
    if reason is None and config.optimizer.sharding == "zero3":
        reason = "takes whole weights, which zero3 divides"
    if reason is not None:
        raise ConfigError(
            f"precision.backend: 'transformer_engine'; accepted with {options.recipe} here: auto, because TransformerEngine {reason}"
        )
    return f"TransformerEngine {transformer_engine.status(grid.world.device).version}"


def switch_target(config: RunConfig) -> str:
    """What the late switch leaves, in words."""
    return "forward in high precision" if config.precision.forward_only else "everything in high precision"
