"""What a user can say about low-precision training."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.kernels.accelerators.transformer_engine import RECIPES
from megatron_ext.option_rules import require, shown

RecipeName = Literal["bf16", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4", "mxfp4"]
GemmName = Literal["forward", "input_gradient", "weight_gradient"]
FOUR_BITS = ("nvfp4", "mxfp4")
SQUARE_BLOCKS = ("nvfp4", "mxfp4", "fp8_blockwise")
"""Recipes with square blocks for weights."""
EMULATED_ONLY = ("mxfp4",)


@dataclass
class PrecisionOptions:
    """In which numbers the matrix products of attention and MLP are computed. Embedding, head, norms and attention scores are not touched.

    The null of a switch is the recipe's own choice; for ``nvfp4`` that of NVIDIA 2025 (arXiv:2509.25149, section 4), which ``mxfp4``
    shares so that only the format differs. Weights, gradients and moments stay as they are: quantized are the operands of products.

    Scales couple tokens: one scale for a tensor makes every value depend on the largest of the pack, and blocks along tokens, of the
    operands of the weight gradient, make them depend on their neighbours. So with a recipe losses and gradients depend on how documents
    are packed, by less than quantization itself moves them, and a change of one document reaches others in its pack. ``fp8_rowwise`` and
    ``mxfp8`` couple no tokens in forward and in the input gradient.
    """

    recipe: RecipeName = "bf16"
    """``bf16``: nothing is quantized, everything is of ``train.dtype``. ``fp8_tensorwise``, ``fp8_rowwise``: one scale a tensor, or a row;
    ``fp8_blockwise``: 1 x 128, and 128 x 128 for weights (DeepSeek-V3, arXiv:2412.19437, section 3.3); ``mxfp8``, ``mxfp4``: 1 x 32 with
    powers of two as scales (OCP MX 1.0); ``nvfp4``: 1 x 16 with scales of 8 bits."""
    gemms: list[GemmName] = field(default_factory=lambda: ["forward", "input_gradient", "weight_gradient"])
    """The products of a linear that are quantized."""
    weights_2d: bool | None = None
    """Scale weights by square blocks, so that forward and backward see the same numbers. null: true for nvfp4, mxfp4, fp8_blockwise."""
    hadamard: bool | None = None
    """Random Hadamard transform of the operands of the weight gradient, along tokens, over one block. null: true for nvfp4 and mxfp4."""
    stochastic_rounding: bool | None = None
    """Round gradients up or down at random, without bias. null: true for nvfp4 and mxfp4."""
    gradient_format: Literal["e4m3", "e5m2"] | None = None
    """FP8 format of gradients. null: e5m2 for fp8_tensorwise, e4m3 for the others."""
    power_of_two_scales: bool = False
    """Only powers of two as the float32 scales of fp8_tensorwise, fp8_rowwise and fp8_blockwise."""
    high_precision_first: int | None = None
    """Blocks at the start of the model that are not quantized. null: 2 of 62 for nvfp4 and mxfp4, at least 1; 0 for the others."""
    high_precision_last: int | None = None
    """Blocks at its end. null: 8 of 62 for nvfp4 and mxfp4, at least 1; 0 for the others."""
    high_precision_names: list[str] = field(default_factory=list)
    """Patterns of parameter names (``*.down_proj.weight``) that are not quantized."""
    switch_at_tokens: int | None = None
    """Quantize no longer in steps that begin after so many tokens of training; null: never."""
    forward_only: bool = False
    """Let only the forward product switch."""
    backend: Literal["auto", "emulated", "native", "transformer_engine"] = "auto"
    """``emulated``: the numbers are exactly those of the format, the products are of bfloat16 or float32 at best at their speed;
    ``native``: the device's own products; ``auto``: native where the device has them. Printed at start. ``transformer_engine``: its own
    linears in its recipe of that name, whose scales, signs and random numbers are its own; see its adapter."""
    communication: Literal["mxfp8", "mxfp4"] | None = None
    """Hand activations and gradients from rank to rank as codes with a scale for every 32, in about 0.52 or 0.27 of the bytes of bfloat16:
    in blocks that are not kept in high precision, what tensor-parallel ranks gather (``parallel.sequence_parallel_activations``), and
    what ranks that share a pack exchange by heads, but for the gradients of q, k and v. Sums stay as they are, and so do rings. Values
    are rounded on every grid, on one rank too, so that the grid changes no result. After the late switch nothing is coded. With any
    recipe."""
    stash: bool = True
    """Keep activations for the weight gradient as codes, not as they were. Changes memory and time, and no bit."""

    def __post_init__(self) -> None:
        four, square = self.recipe in FOUR_BITS, self.recipe in SQUARE_BLOCKS
        eight = not four and self.recipe != "bf16"
        no, random = f"null or false with {self.recipe}; true with", " and ".join(FOUR_BITS)
        counts = {"high_precision_first": self.high_precision_first, "high_precision_last": self.high_precision_last}
        require(
            (bool(self.gemms) and len(set(self.gemms)) == len(self.gemms), "gemms", self.gemms, "some of the three products, each once"),
            (square or not self.weights_2d, "weights_2d", self.weights_2d, f"{no} {', '.join(SQUARE_BLOCKS)}"),
            (
                four or not self.hadamard,
                "hadamard",
                self.hadamard,
                f"{no} {random}",
            ),
            (
                four or not self.stochastic_rounding,
                "stochastic_rounding",
                self.stochastic_rounding,
                f"{no} {random}",
            ),
            (
                eight or self.gradient_format is None,
                "gradient_format",
                self.gradient_format,
                f"null with {self.recipe}, which has no numbers of 8 bits",
            ),
            (
                self.recipe.startswith("fp8") or not self.power_of_two_scales,
                "power_of_two_scales",
                self.power_of_two_scales,
                f"false with {self.recipe}, which leaves no choice",
            ),
            *((count is None or count >= 0, key, count, "a number of blocks, at least 0, or null") for key, count in counts.items()),
            (
                self.switch_at_tokens is None or self.switch_at_tokens >= 0,
                "switch_at_tokens",
                self.switch_at_tokens,
                "a number of tokens, at least 0, or null",
            ),
            (
                not self.forward_only or self.switch_at_tokens is not None,
                "forward_only",
                self.forward_only,
                "false, because switch_at_tokens is null",
            ),
            (
                self.backend != "native" or self.recipe not in (*EMULATED_ONLY, "bf16"),
                "backend",
                self.backend,
                f"auto or emulated with {self.recipe}, which has no native products",
            ),
            *self._transformer_engine_rules(),
        )

    def _transformer_engine_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        """Its recipes are whole: it has none of the switches."""
        if self.backend != "transformer_engine":
            return
        yield self.recipe in RECIPES, "recipe", self.recipe, f"with backend transformer_engine: {', '.join(RECIPES)}"
        usual = PrecisionOptions()
        for key in ("gemms", "weights_2d", "hadamard", "stochastic_rounding", "gradient_format", "power_of_two_scales", "switch_at_tokens"):
            value, default = getattr(self, key), getattr(usual, key)
            yield value == default, key, value, f"{shown(default)} with backend transformer_engine, whose recipes have no such switch"
