"""The config.json of models that no Hugging Face family has: every field of ``ModelConfig`` under its own name."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_type_hints

from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rope_scaling import yarn_by_ratio
from megatron_ext.option_rules import shown

OWN_TYPE = "megatron_ext"
"""Their ``model_type``."""
ADDED_LATER = frozenset({"rope"})
"""Keys that older checkpoints do not have: their models are what the defaults say."""
BESIDE = ("model_type", "no_family_has", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
"""Keys that say nothing about the model."""


def no_family_has(config: ModelConfig) -> list[str]:
    """What of a model neither Llama nor Qwen2 nor Qwen3 has, as keys of the configuration with their values; empty if one has it all."""
    plain = NormOptions()
    found = [f"norm.{key} {value!r}" for key, value in asdict(config.norm).items() if value != getattr(plain, key)]
    found += [key for key in ("embedding_projection", "mlp_bias", "head_bias") if getattr(config, key)]
    found += ["qk_norm together with model.qkv_bias"] * (config.qk_norm and config.qkv_bias)
    rope = config.rope
    if rope.kind == "yarn" and yarn_by_ratio(rope, config.head_dim, config.rope_theta, config.max_position) is None:
        found.append(
            f"rope.factor {rope.factor:g} with model.max_position {config.max_position:,} and rope.original_max_position "
            f"{rope.original_max_position:,}: some releases of transformers read the ratio of these two instead"
        )
    return [f"model.{each}" for each in found]


def own_config(config: ModelConfig, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of ``config``, with the values of ``beside`` (keys of ``BESIDE``)."""
    return {"model_type": OWN_TYPE, "no_family_has": no_family_has(config), **beside, **asdict(config)}


def read_own_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that such a config.json describes.

    Raises:
        CheckpointError: a key is missing, unknown or of another kind, or the model is impossible.
    """
    try:
        return _read(ModelConfig, {key: value for key, value in values.items() if key not in BESIDE}, "config.json")
    except ConfigError as error:
        raise CheckpointError(f"config.json describes an impossible model: {error}") from error


def _read(kind: Any, value: Any, key: str) -> Any:
    """``value`` as a dataclass, one of a set of words, or a number or truth value."""
    if is_dataclass(kind):
        return _read_fields(kind, value, key)
    words = get_args(kind)
    fits = value in words if words else type(value) in ((int, float) if kind is float else (kind,))
    if not fits:
        accepted = ", ".join(map(repr, words)) if words else kind.__name__
        raise CheckpointError(f"{key}: {shown(value)}; accepted: {accepted}")
    return value


def _read_fields(kind: Any, value: Any, key: str) -> Any:
    kinds = get_type_hints(kind)
    if not isinstance(value, dict):
        raise CheckpointError(f"{key}: {shown(value)}; accepted: an object with {', '.join(kinds)}")
    if wrong := sorted((value.keys() ^ kinds.keys()) - (ADDED_LATER - value.keys())):
        raise CheckpointError(f"{key}: {wrong[0]} is {'unknown' if wrong[0] in value else 'missing'}; needed are {', '.join(kinds)}")
    return kind(**{name: _read(kinds[name], value[name], f"{key}: {name}") for name in kinds if name in value})
