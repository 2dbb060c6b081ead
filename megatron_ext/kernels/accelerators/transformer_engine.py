"""The adapter to TransformerEngine: a linear whose three products run in FP8, MXFP8 or NVFP4 by its kernels, on the GPUs that have them.

It calls ``Linear``, ``autocast``, the recipes and the questions about the GPU that ``transformer_engine.pytorch`` documents since 2.9, and
nothing else. Among what is documented there is no product of matrices that somebody else has quantized: ``general_gemm`` of its
``cpp_extensions`` is not documented and has changed its arguments from version to version. So this is no backend of ``fp8_gemm`` and
``nvfp4_gemm``, whose native products are PyTorch's. What TransformerEngine adds to those are its kernels that quantize, and they work
only inside its own modules.

The numbers are those of its recipe, which has the name of ours that it comes next to. Scales and rounding differ in details, signs and
random numbers are its own and are not saved: a run that is stopped and continued is not the same bit for bit with nvfp4.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators.adapter import Accelerator, gpu_obstacle, imported, installed_version, present, signature_obstacle

WRITTEN_AGAINST = "TransformerEngine 2.9 to 2.20"
MULTIPLE = 32
"""Of all three sides of its products: FP8 and NVFP4 need 16, MXFP8 blocks of 32."""


class _Recipe(NamedTuple):
    constructor: str
    """In transformer_engine.common.recipe."""
    question: str
    """Of transformer_engine.pytorch: whether this GPU can run it."""
    capability: tuple[int, int]
    """Of a GPU, at least."""


RECIPES = {
    "fp8_tensorwise": _Recipe("Float8CurrentScaling", "is_fp8_available", (8, 9)),
    "fp8_blockwise": _Recipe("Float8BlockScaling", "is_fp8_block_scaling_available", (9, 0)),
    "mxfp8": _Recipe("MXFP8BlockScaling", "is_mxfp8_available", (10, 0)),
    "nvfp4": _Recipe("NVFP4BlockScaling", "is_nvfp4_available", (10, 0)),
}
CALLS = {
    "transformer_engine.pytorch": {
        "Linear": ("in_features", "out_features", "bias", "params_dtype", "device"),
        "autocast": ("enabled", "recipe"),
        **{recipe.question: ("return_reason",) for recipe in RECIPES.values()},
    },
    "transformer_engine.common.recipe": {recipe.constructor: () for recipe in RECIPES.values()},
}
NO_PRODUCTS = "documents no product of matrices that are quantized already"


def status(device: torch.device) -> Accelerator:
    """What is installed and what it would serve on ``device``."""
    services = {f"linear in {name}": recipe_obstacle(name, device) for name in RECIPES}
    services["fp8_gemm, nvfp4_gemm"] = NO_PRODUCTS
    return Accelerator("TransformerEngine", WRITTEN_AGAINST, installed_version("transformer_engine"), services)


def recipe_obstacle(recipe: str, device: torch.device) -> str | None:
    """Why a linear of ``recipe`` cannot run on ``device``, or None if it can. The last word is TransformerEngine's own."""
    if reason := gpu_obstacle(device, RECIPES[recipe].capability) or obstacle():
        return reason
    import transformer_engine.pytorch as te

    with torch.cuda.device(device):
        able, reason = getattr(te, RECIPES[recipe].question)(return_reason=True)
    return None if able else f"has other needs: {reason}"


@cache
def obstacle() -> str | None:
    """Why the package cannot be called, wherever, or None if it can."""
    if not present("transformer_engine"):
        return "needs the package transformer_engine, which is not installed"
    for name, calls in CALLS.items():
        module = imported(name)
        reason = module if isinstance(module, str) else signature_obstacle(module, calls, WRITTEN_AGAINST)
        if reason:
            return f"needs the package transformer_engine, which {reason}"
    return None


class Linear:
    """x W^T and its gradients, all three products in a recipe of TransformerEngine.

    Args:
        weight: bfloat16 or float32 [N, K] on a GPU, N and K multiples of 32. It stays the caller's, who finds its gradient in ``grad``.
        recipe: one of ``RECIPES``.

    Raises:
        ConfigError: the recipe is unknown or cannot run on the weight's device, or the shape does not fit.
    """

    def __init__(self, weight: nn.Parameter, recipe: str) -> None:
        if recipe not in RECIPES:
            raise ConfigError(f"TransformerEngine has no recipe {recipe!r}; accepted are {', '.join(RECIPES)}")
        if reason := recipe_obstacle(recipe, weight.device):
            raise ConfigError(f"linear in {recipe} by TransformerEngine {reason}")
        rows, columns = weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            raise ConfigError(f"linear of {list(weight.shape)} by TransformerEngine; accepted are multiples of {MULTIPLE}")
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te

        self._recipe = getattr(recipes, RECIPES[recipe].constructor)()
        self._module = te.Linear(in_features=columns, out_features=rows, bias=False, params_dtype=weight.dtype, device="meta")
        self._module.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N] of ``x`` [T, K], both in the dtype of the weight. T is filled up with zeros."""
        import transformer_engine.pytorch as te

        missing = -len(x) % MULTIPLE if len(x) else MULTIPLE
        padded = nn.functional.pad(x, (0, 0, 0, missing))
        with te.autocast(enabled=True, recipe=self._recipe):
            return self._module(padded)[: len(x)]
