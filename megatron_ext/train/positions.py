"""The model of a checkpoint with the positions that a run asks for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_ext.checkpoint.hf import read_hf_json
from megatron_ext.checkpoint.hf_config import config_from_hf
from megatron_ext.checkpoint.hf_rope import scaling_kind, without_scaling
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.options import ModelOptions
from megatron_ext.model.rope_scaling import resolve_rope


def checkpoint_model(options: ModelOptions, sequence_length: int) -> ModelConfig:
    """The model of ``options.init_from``, its base, scaling and longest position overridden by what ``options`` set.

    Args:
        options: with ``init_from``.
        sequence_length: longest document of the run, in tokens.

    Raises:
        CheckpointError: config.json describes no model that there is here.
        OptionError: positions that ``options`` leave open and config.json does not decide.
    """
    assert options.init_from is not None, "there is a checkpoint"
    return extended(read_hf_json(options.init_from), options, sequence_length)


def extended(hf: Mapping[str, Any], options: ModelOptions, sequence_length: int) -> ModelConfig:
    """As ``checkpoint_model``, from what config.json holds."""
    model = config_from_hf(hf if options.rope is None else without_scaling(hf))
    theta, rope, longest = options.rope_theta or model.rope_theta, options.rope, max(model.max_position, sequence_length)
    if rope is None:
        return replace(model, rope_theta=theta, max_position=options.max_position or longest)
    if rope.original_max_position is None and scaling_kind(hf) == "default":
        rope = replace(rope, original_max_position=model.max_position)
    longest = options.max_position or max(longest, int((rope.factor or 1.0) * (rope.original_max_position or 0)))
    theta, scaling = resolve_rope(rope, theta, model.head_dim, longest)
    return replace(model, rope_theta=theta, rope=scaling, max_position=longest)


def describe_positions(options: ModelOptions, model: ModelConfig) -> dict[str, str]:
    """A line for the banner, where positions are scaled or not those of the checkpoint.

    Args:
        options: of the run.
        model: made from them.
    """
    scaled, now = model.rope.kind != "default", _described(model)
    if options.init_from is None:
        return {"positions": now} if scaled else {}
    hf = read_hf_json(options.init_from)
    kind, replaced = scaling_kind(hf), options.rope is not None
    was = _described(config_from_hf(without_scaling(hf) if replaced else hf)) + (f", {kind}" if replaced and kind != "default" else "")
    if now == was:
        return {"positions": now} if scaled else {}
    how = " by ntk" if options.rope and options.rope.kind == "ntk" else ""
    return {"positions": f"{now}{how}; in the checkpoint {was}"}


def _described(model: ModelConfig) -> str:
    rope, text = model.rope, f"up to {model.max_position:,}, base {model.rope_theta:,.8g}"
    if rope.kind != "default":
        text += f", {rope.kind}: factor {rope.factor:g}"
    if rope.original_max_position:
        text += f" of {rope.original_max_position:,}"
    return text + (f", attention factor {rope.attention_factor:.4g}" if rope.attention_factor != 1 else "")
