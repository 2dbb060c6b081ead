"""Training recipes: which operand of which matrix product of which linear is quantized, and how."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from megatron_ext.precision.options import FOUR_BITS, SQUARE_BLOCKS, GemmName, PrecisionOptions

FIRST_SHARE, LAST_SHARE = 2 / 62, 8 / 62
"""Blocks of the 12B model of arXiv:2509.25149 (appendix A.1) that stay in bfloat16: the first 2 and the last 8 of 62."""


@dataclass(frozen=True)
class Operand:
    """How an operand of a product is quantized. Blocks lie along the dimension that the product sums over."""

    format: str
    """A recipe's name but ``bf16``, which is what its numbers and scales are."""
    square: bool = False
    """One scale for as many rows as columns, so that the matrix and its transpose have the same codes."""
    transform: bool = False
    """By a random Hadamard transform of the order of a block first."""
    stochastic: bool = False
    """Rounded at random, not to nearest."""
    dtype: torch.dtype = torch.float8_e4m3fn
    """Of codes of 8 bits."""
    power_of_two: bool = False
    """Scales of float32 are powers of two."""


@dataclass(frozen=True)
class Gemm:
    """The operands of a product a b^T."""

    a: Operand
    b: Operand


@dataclass(frozen=True)
class LinearRecipe:
    """The three products of y = x W^T with x [T, in] and W [out, in]. None: in the types of the operands, not quantized."""

    forward: Gemm | None
    """y = x W^T, sums over in: x by rows, W by rows."""
    input_gradient: Gemm | None
    """dx = dy W, sums over out: dy by rows, W by columns."""
    weight_gradient: Gemm | None
    """dW = dy^T x, sums over T: dy by columns, x by columns."""

    @property
    def quantizes(self) -> bool:
        """Whether any product is quantized."""
        return bool(self.forward or self.input_gradient or self.weight_gradient)


@dataclass(frozen=True)
class Recipe:
    """What ``options`` say of every linear."""

    options: PrecisionOptions

    def for_linear(self, name: str, layer: int, num_layers: int) -> LinearRecipe | None:
        """The products of one linear inside the blocks of a model; None if none is quantized.

        Args:
            name: of its weight, ``model.layers.3.self_attn.q_proj.weight``.
            layer: of ``num_layers``, from 0.
            num_layers: of the whole model.
        """
        first, last = self.kept_layers(num_layers)
        inside = first <= layer < num_layers - last
        kept = any(fnmatchcase(name, pattern) for pattern in self.options.high_precision_names)
        return self._quantized() if inside and not kept and self.options.recipe != "bf16" else None

    def kept_layers(self, num_layers: int) -> tuple[int, int]:
        """How many blocks at the start and at the end of a model of ``num_layers`` are not quantized."""
        options = self.options
        usual = [max(1, round(share * num_layers)) if options.recipe in FOUR_BITS else 0 for share in (FIRST_SHARE, LAST_SHARE)]
        given = (options.high_precision_first, options.high_precision_last)
        first, last = (default if count is None else count for count, default in zip(given, usual, strict=True))
        return first, last

    def after_switch(self, recipe: LinearRecipe) -> LinearRecipe:
        """What is left of a linear's recipe when the run has switched to high precision."""
        return replace(recipe, forward=None) if self.options.forward_only else LinearRecipe(None, None, None)

    def _quantized(self) -> LinearRecipe:
        options = self.options
        x = Operand(options.recipe, power_of_two=options.power_of_two_scales)
        weight = replace(x, square=_or(options.weights_2d, options.recipe in SQUARE_BLOCKS))
        e5m2 = (options.gradient_format or ("e5m2" if options.recipe == "fp8_tensorwise" else "e4m3")) == "e5m2"
        four = options.recipe in FOUR_BITS
        stochastic, transform = _or(options.stochastic_rounding, four), _or(options.hadamard, four)
        dy = replace(x, stochastic=stochastic, dtype=torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn)
        gemms: dict[GemmName, Gemm] = {
            "forward": Gemm(x, weight),
            "input_gradient": Gemm(dy, weight),
            "weight_gradient": Gemm(replace(dy, transform=transform), replace(x, transform=transform)),
        }
        return LinearRecipe(**{name: gemm if name in options.gemms else None for name, gemm in gemms.items()})

    def __str__(self) -> str:
        """For people: what is quantized, with which of the switches."""
        recipe, options = self._quantized(), self.options
        operands = [
            operand for gemm in (recipe.forward, recipe.input_gradient, recipe.weight_gradient) if gemm for operand in (gemm.a, gemm.b)
        ]
        switches = {
            "square weight blocks": any(operand.square for operand in operands),
            "random Hadamard transform": any(operand.transform for operand in operands),
            "stochastic rounding of gradients": any(operand.stochastic for operand in operands),
            "scales that are powers of two": options.power_of_two_scales,
            "gradients in e5m2": any(operand.dtype == torch.float8_e5m2 for operand in operands),
            f"only {', '.join(options.gemms)}": len(options.gemms) < 3,
        }
        return ", ".join([options.recipe, *(name for name, on in switches.items() if on)])


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
