"""Bytes of the codes that low precision keeps, and of what they are kept instead of."""

from collections.abc import Mapping, Sequence

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import linear_recipes
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.recipe import LinearRecipe, Operand, Recipe

BYTES = {
    "fp8_tensorwise": 1,
    "fp8_rowwise": 1,
    "fp8_blockwise": 1 + 4 / 128,
    "mxfp8": 1 + 1 / 32,
    "nvfp4": 1 / 2 + 1 / 16,
    "mxfp4": 1 / 2 + 1 / 32,
}
"""Of a value: its code, and its share of the scale of a block of one row."""
SQUARES = {"fp8_blockwise": 1 + 4 / 128**2, "nvfp4": 1 / 2 + 1 / 16**2, "mxfp4": 1 / 2 + 1 / 32**2}
"""Of a value whose scale is that of a square block."""


def code_bytes(operand: Operand) -> float:
    """Bytes of a value of a quantized operand."""
    return SQUARES[operand.format] if operand.square else BYTES[operand.format]


def weight_codes(options: PrecisionOptions, model: ModelConfig, held: GPT) -> int:
    """Bytes of the codes of a rank's weights, which its linears keep for forward and for backward.

    Args:
        options: of low precision.
        model: shape of the whole model.
        held: this rank's part of it.
    """
    recipes, total = linear_recipes(model, Recipe(options)), 0.0
    for name, parameter in held.named_parameters():
        if (recipe := recipes.get(name)) is not None:
            operands = [gemm.b for gemm in (recipe.forward, recipe.input_gradient) if gemm is not None]
            total += parameter.numel() * sum(code_bytes(operand) for operand in operands)
    return int(total)


def stashed(options: PrecisionOptions, model: ModelConfig, layers: Sequence[int], sizes: Mapping[str, int], itemsize: int) -> int:
    """By how many bytes the activations of blocks change where linears keep codes of their inputs.

    Args:
        options: of low precision.
        model: shape of the whole model.
        layers: numbers of the blocks.
        sizes: values of an input of q, k, v, gate and up (``hidden``), of o (``queries``) and of down (``channels``) of one block.
        itemsize: bytes of a value that is not quantized.
    """
    if not options.stash:
        return 0
    recipes = linear_recipes(model, Recipe(options))
    return sum(_stashed_by_block(recipes, f"model.layers.{layer}", sizes, itemsize) for layer in layers)


def _stashed_by_block(recipes: Mapping[str, LinearRecipe | None], block: str, sizes: Mapping[str, int], itemsize: int) -> int:
    change = 0.0
    for linears, size, other_reader in (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), sizes["hidden"], False),
        (("self_attn.o_proj",), sizes["queries"], True),  # attention keeps its output too
        (("mlp.gate_proj", "mlp.up_proj"), sizes["hidden"], False),
        (("mlp.down_proj",), sizes["channels"], False),
    ):
        found = [recipes[f"{block}.{linear}.weight"] for linear in linears]
        operands = {recipe.weight_gradient.b for recipe in found if recipe is not None and recipe.weight_gradient is not None}
        kept_as_codes = [recipe is not None and recipe.weight_gradient is not None for recipe in found]
        if not any(kept_as_codes):
            continue
        change += size * sum(code_bytes(operand) for operand in operands)
        change -= 0 if other_reader or not all(kept_as_codes) else size * itemsize
    return int(change)
