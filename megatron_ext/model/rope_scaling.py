"""Frequencies of rotary positions for documents longer than those of the first training."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.model.rope_options import RopeOptions
from megatron_ext.option_rules import require


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from those of the base alone. What a kind does not read stays as it is here."""

    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    """Tokens; read by yarn and llama3."""
    attention_factor: float = 1.0
    """Of queries and of keys."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        """Refuse what has no frequencies; a checkpoint may say anything."""
        numbers = ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
        original, needed = self.original_max_position, self.kind in ("yarn", "llama3")
        require(
            *((0 < getattr(self, name) < math.inf, f"rope.{name}", getattr(self, name), "a number above 0") for name in numbers),
            (original > 0 or not needed, "rope.original_max_position", original, f"at least 1 with kind {self.kind}"),
        )


def resolve_rope(options: RopeOptions | None, theta: float, head_dim: int, max_position: int) -> tuple[float, RopeScaling]:
    """Base and scaling that ``options`` ask for, with no key left open.

    NTK-aware interpolation (Peng et al. 2023, arXiv:2309.00071, section 3.1) is a change of the base: theta times
    factor^(head_dim / (head_dim - 2)).

    Args:
        options: what the user or a checkpoint says; None: nothing.
        theta: base before.
        head_dim: channels of a head.
        max_position: longest document, in tokens, that the model is to read.

    Raises:
        OptionError: a number is missing that cannot be had from others, or there is nothing to extend.
    """
    if options is None or options.kind == "default":
        return theta, RopeScaling()
    _require_numbers(options, theta, head_dim, max_position)
    factor = options.factor or max_position / (options.original_max_position or max_position)
    match options.kind:
        case "linear":
            return theta, RopeScaling("linear", factor)
        case "ntk":
            return theta * factor ** (head_dim / (head_dim - 2)), RopeScaling()
        case "yarn":
            return theta, _yarn(options, factor)
        case "llama3":
            low, high = options.low_freq_factor or 1.0, options.high_freq_factor or 4.0
            return theta, RopeScaling("llama3", factor, _original(options), low_freq_factor=low, high_freq_factor=high)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Angle of each pair of channels between neighbouring tokens, in radians: [head_dim / 2] of ``dtype``.

    Every kind gives each pair a share of interpolation, between its frequency (0) and that divided by the factor (1):

    - ``linear``: 1 for all (position interpolation: Chen et al. 2023, arXiv:2306.15595, section 2.3).
    - ``yarn``: rises with the number of the pair, from the one that turns ``beta_fast`` times in the original length to the one that turns
      ``beta_slow`` times (Peng et al. 2023, arXiv:2309.00071, section 3.2).
    - ``llama3``: falls with the turns in the original length themselves, from ``low_freq_factor`` to ``high_freq_factor`` (the code that
      Llama 3.1 was published with).
    """
    pairs = torch.arange(0, head_dim, 2, dtype=dtype, device=device)
    plain = 1.0 / theta ** (pairs / head_dim)
    match scaling.kind:
        case "default":
            return plain
        case "linear":
            return plain / scaling.factor
        case "yarn":
            first, last = yarn_range(head_dim, theta, scaling)
            share = (pairs / 2 - first) / (last - first)
        case "llama3":
            turns = scaling.original_max_position * plain / (2 * math.pi)
            share = (scaling.high_freq_factor - turns) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return plain * (1 - share) + plain / scaling.factor * share


def yarn_range(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Numbers of the pairs between which YaRN's interpolation rises from none to all."""

    def pair(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # The published code parts the two by this much where they are one.
    return first, last + 0.001 if first == last else last


def yarn_by_ratio(scaling: RopeScaling, head_dim: int, theta: float, max_position: int) -> RopeScaling | None:
    """The same frequencies from an original length that ``max_position`` is ``factor`` times as long as; None: there is none.

    Pairs are told apart by turns in the original length, so that turns and length can be changed together. The length must be whole, and
    rounding must not move a pair.
    """
    original = max_position / scaling.factor
    if original == scaling.original_max_position:
        return scaling
    if not original.is_integer() or original < 1:
        return None
    change = original / scaling.original_max_position
    fast, slow = scaling.beta_fast * change, scaling.beta_slow * change
    found = replace(scaling, original_max_position=int(original), beta_fast=fast, beta_slow=slow)
    if scaling.truncate and yarn_range(head_dim, theta, found) != yarn_range(head_dim, theta, scaling):
        return None
    return found


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Square root of the factor of logits that suits ``factor`` (Peng et al. 2023, arXiv:2309.00071, section 3.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _yarn(options: RopeOptions, factor: float) -> RopeScaling:
    attention_factor = options.attention_factor or yarn_attention_factor(factor)
    if options.mscale is not None and options.mscale_all_dim is not None:
        attention_factor = yarn_attention_factor(factor, options.mscale) / yarn_attention_factor(factor, options.mscale_all_dim)
    truncate = True if options.truncate is None else options.truncate
    fast, slow = options.beta_fast or 32.0, options.beta_slow or 1.0
    return RopeScaling("yarn", factor, _original(options), attention_factor, fast, slow, truncate)


def _original(options: RopeOptions) -> int:
    assert options.original_max_position is not None, "its rule was checked"
    return options.original_max_position


def _require_numbers(options: RopeOptions, theta: float, head_dim: int, max_position: int) -> None:
    original = options.original_max_position
    needed = options.factor is None or options.kind in ("yarn", "llama3")
    require(
        (
            original is not None or not needed,
            "model.rope.original_max_position",
            original,
            "a number of tokens: the longest document that the model was trained on before positions were scaled",
        ),
        (
            options.factor is not None or original is None or max_position > original,
            "model.rope.factor",
            options.factor,
            f"a number, because model.max_position ({max_position}) is not above model.rope.original_max_position ({original})",
        ),
        (theta > 1, "model.rope_theta", theta, f"more than 1 with model.rope.kind {options.kind}"),
        (options.kind != "ntk" or head_dim > 2, "model.rope.kind", options.kind, f"others with a head_dim of {head_dim}"),
    )
