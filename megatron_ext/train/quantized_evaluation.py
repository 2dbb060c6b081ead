"""What quantization costs a trained model: its loss before and after, and which of its linears suffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.gpt import GPT
from megatron_ext.precision.post_training import Scheme
from megatron_ext.train.quantized_model import block_linears, quantized

UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class QuantizedLoss:
    """Mean loss of a model in nats a token, and how much more that is than unquantized."""

    scheme: str
    loss: float
    increase: float


def quantized_losses(model: GPT, schemes: Sequence[Scheme], packs: Sequence[PackedBatch]) -> list[QuantizedLoss]:
    """The loss as it is, named ``UNQUANTIZED``, then under each scheme. The packs are on the device of the model."""
    before = mean_loss(model, packs)
    losses = [QuantizedLoss(UNQUANTIZED, before, 0.0)]
    for scheme in schemes:
        with quantized(model, scheme):
            loss = mean_loss(model, packs)
        losses.append(QuantizedLoss(scheme.name, loss, loss - before))
    return losses


@torch.no_grad()
def mean_loss(model: GPT, packs: Sequence[PackedBatch]) -> float:
    """Mean cross-entropy in nats a token. The packs are on the device of the model."""
    loss = tokens = 0.0
    for pack in packs:
        loss += float(model(*pack.model_inputs)[0])
        tokens += float(pack.loss_weight.sum())
    return loss / max(1.0, tokens)


@dataclass(frozen=True)
class LinearError:
    """What quantization does to one linear when its inputs come from the unquantized model: |error| / |value| in root mean squares."""

    name: str
    weight: float
    input: float
    output: float


@torch.no_grad()
def linear_errors(model: GPT, scheme: Scheme, packs: Sequence[PackedBatch]) -> list[LinearError]:
    """The errors of every linear in a block, worst output first, from one pass over ``packs``."""
    linears = block_linears(model)
    weights = {name: scheme.weight(linear.weight) if scheme.weight else linear.weight for name, linear in linears.items()}
    sums = {name: torch.zeros(2, 2, dtype=torch.float64) for name in linears}
    hooks = [
        linear.register_forward_hook(partial(_add_errors, sums=sums[name], weight=weights[name], scheme=scheme))
        for name, linear in linears.items()
    ]
    try:
        mean_loss(model, packs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, linear in linears.items():
        of_input, of_output = (_ratio(*pair) for pair in sums[name].tolist())
        of_weight = _ratio(*_squares(weights[name], linear.weight).tolist())
        found.append(LinearError(name, of_weight, of_input, of_output))
    return sorted(found, key=lambda each: -each.output)


@dataclass(frozen=True)
class LinearLoss:
    """Mean loss in nats a token when one linear is the only one that is quantized, and how much more that is than before."""

    name: str
    loss: float
    increase: float


def linear_losses(model: GPT, scheme: Scheme, packs: Sequence[PackedBatch], before: float) -> list[LinearLoss]:
    """The loss of every linear in a block, highest first: an evaluation for each. ``before`` is the loss of the unquantized model."""
    losses = []
    for name in block_linears(model):
        with quantized(model, scheme, only={name}):
            loss = mean_loss(model, packs)
        losses.append(LinearLoss(name, loss, loss - before))
    return sorted(losses, key=lambda each: -each.loss)


def _add_errors(linear: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor, *, sums: Tensor, weight: Tensor, scheme: Scheme) -> None:
    """Add squares of errors and values, of the inputs and of the outputs of a linear, to ``sums`` [2, 2]."""
    x = scheme.activation(arguments[0]) if scheme.activation else arguments[0]
    sums[0] += _squares(x, arguments[0])
    sums[1] += _squares(F.linear(x, weight, linear.bias), output)


def _squares(changed: Tensor, value: Tensor) -> Tensor:
    """Sum of squares of the difference, and of ``value``: float64 [2] on the CPU."""
    return torch.stack([(changed - value).double().square().sum(), value.double().square().sum()]).cpu()


def _ratio(error: float, value: float) -> float:
    return (error / value) ** 0.5 if value else 0.0
