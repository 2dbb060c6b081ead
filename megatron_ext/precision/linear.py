"""y = x W^T + bias with the three matrix products of training in low precision, as one function of autograd."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.precision.operands import Pair, Part, Quantized, Reduces, quantize, stripped
from megatron_ext.precision.products import product
from megatron_ext.precision.recipe import LinearRecipe, Operand
from megatron_ext.precision.state import PrecisionState


class LinearPrecision:
    """How one linear is computed, and its quantized weight.

    Args:
        name: of the weight; random numbers depend on it.
        recipe: of its products.
        switched: of its products after the late switch.
        state: of the model.
        divided: which features the ranks of ``group`` divide: ``outputs`` (rows of the weight) or ``inputs`` (columns).
        start: the first of this rank's features of those.
        group: the ranks; None: this one has all features.
        stash: keep inputs for backward as codes.
        backend: of products, see ``product``.
    """

    def __init__(
        self,
        name: str,
        recipe: LinearRecipe,
        state: PrecisionState,
        *,
        switched: LinearRecipe | None = None,
        divided: Literal["outputs", "inputs"] = "outputs",
        start: int = 0,
        group: Reduces | None = None,
        stash: bool = True,
        backend: str = "auto",
    ) -> None:
        self.name, self.state = name, state
        self._recipe, self._switched = recipe, switched or recipe
        self._start, self._inputs, self._outputs = start, group if divided == "inputs" else None, group if divided == "outputs" else None
        self._group = group
        self.stash, self.backend = stash, backend
        self._weight: tuple[int, Pair] = (-1, (None, None))

    @property
    def recipe(self) -> LinearRecipe:
        """Of the products now: before the late switch, or after it."""
        return self._switched if self.state.switched else self._recipe

    def input(self, x: Tensor, rows: Operand | None, columns: Operand | None) -> Pair:
        """Quantize x [T, in]."""
        return quantize(x, rows, columns, Part(self._inputs, signs=self._signs(x, columns)))

    def weight(self, weight: Tensor) -> Pair:
        """Quantize W [out, in]: once, until weights may have changed."""
        recipe, (version, pair) = self.recipe, self._weight
        if version != self.state.version:
            rows = recipe.forward.b if recipe.forward else None
            columns = recipe.input_gradient.b if recipe.input_gradient else None
            pair = quantize(weight.detach(), rows, columns, Part(self._group, dimension=0 if self._inputs is None else 1))
            self._weight = (self.state.version, pair)
        return pair

    def gradient(self, dy: Tensor, rows: Operand | None, columns: Operand | None, seed: int) -> Pair:
        """Quantize dy [T, out]."""
        offset = (0, self._start if self._outputs is not None else 0)
        return quantize(dy, rows, columns, Part(self._outputs, offset=offset, seed=seed, signs=self._signs(dy, columns)))

    def rounding_seed(self) -> int:
        """For the gradient of the pack of now."""
        return self.state.rounding_seed(self.name, "gradient")

    def _signs(self, x: Tensor, columns: Operand | None) -> Tensor | None:
        if columns is None or not columns.transform:
            return None
        return self.state.signs_for(x, 32 if columns.format.startswith("mx") else 16)


class SharedInput:
    """The codes of an input that several linears have, so that it is quantized once. They all have all features of it, or all the same.

    Made anew for every input. Rows and columns are there while the linears compute; in backward, columns of an input that was kept as it
    was are made by the first linear that needs them.
    """

    def __init__(self) -> None:
        self._forward: dict[tuple[Operand | None, Operand | None], Pair] = {}
        self.columns: dict[Operand, Quantized] = {}
        """In backward. It is what autograd holds, instead of this object and its codes."""

    def quantized(self, precision: LinearPrecision, x: Tensor, rows: Operand | None, columns: Operand | None) -> Pair:
        """Rows and columns of ``x`` [T, in]."""
        if (rows, columns) not in self._forward:
            self._forward[rows, columns] = precision.input(x, rows, columns)
        return self._forward[rows, columns]


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, precision: LinearPrecision, shared: SharedInput | None = None
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: [..., in] bfloat16 or float32.
        weight: [out, in] bfloat16 or float32.
        bias: [out] or None.
        precision: of this linear.
        shared: of ``x``, if other linears have the same input.

    Returns:
        [..., out] in the type of ``x``. Sizes may be odd or 0: blocks are filled up with zeros, which change no result.
    """
    if not precision.recipe.quantizes:
        return F.linear(x, weight, bias)
    learns = torch.is_grad_enabled() and weight.requires_grad
    y = _Linear.apply(x.flatten(0, -2), weight, bias, precision, shared or SharedInput(), learns)
    return y.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """See ``quantized_linear``; ``learns``: whether the weight will have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, precision: LinearPrecision, shared: SharedInput, learns: bool
    ) -> Tensor:
        recipe = precision.recipe
        forward, last = recipe.forward, recipe.weight_gradient if learns else None
        rows, columns = shared.quantized(precision, x, forward and forward.a, last.b if last and precision.stash else None)
        weight_rows, ctx.weight_columns = precision.weight(weight)
        tensors, ctx.rebuild = stripped(columns) if columns is not None else ([], None)
        # Only tensors that go through here are dropped by activation checkpointing. The codes of the weight belong to the linear.
        ctx.save_for_backward(x if columns is None and learns else None, weight if ctx.weight_columns is None else None, *tensors)
        ctx.precision, ctx.recipe, ctx.shared_columns, ctx.dtypes = precision, recipe, shared.columns, (x.dtype, weight.dtype)
        ctx.seed = precision.rounding_seed()
        y = x @ weight.mT if rows is None or weight_rows is None else product(rows, weight_rows, x.dtype, precision.backend)
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        recipe, (wants_dx, wants_dw, wants_db, *_) = ctx.recipe, ctx.needs_input_grad
        second, third = recipe.input_gradient if wants_dx else None, recipe.weight_gradient if wants_dw else None
        rows, columns = ctx.precision.gradient(dy, second and second.a, third and third.a, ctx.seed)
        dx = dw = None
        if wants_dx:
            dx = dy @ weight if rows is None else product(rows, ctx.weight_columns, ctx.dtypes[0], ctx.precision.backend)
        if wants_dw and columns is None:
            dw = dy.mT @ x
        elif wants_dw:
            x_columns = ctx.rebuild(tensors) if tensors else _kept_columns(ctx, x, third.b)
            dw = product(columns, x_columns, ctx.dtypes[1], ctx.precision.backend)
        return dx, dw, dy.sum(0) if wants_db else None, None, None, None


def _kept_columns(ctx: Any, x: Tensor, operand: Operand) -> Quantized:
    """Columns of an input that was kept as it was."""
    if operand not in ctx.shared_columns:
        ctx.shared_columns[operand] = ctx.precision.input(x, None, operand)[1]
    return ctx.shared_columns[operand]
