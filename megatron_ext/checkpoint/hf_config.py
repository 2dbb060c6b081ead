"""Between ``ModelConfig`` and the config.json of Llama, Mistral, Qwen2 and Qwen3, or of this package where none of them has the model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.checkpoint.hf_rope import rope_from_hf, rope_to_hf
from megatron_ext.checkpoint.own_config import OWN_TYPE, no_family_has, own_config, read_own_config
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.model.config import LARGEST_SIZE, ModelConfig
from megatron_ext.option_rules import shown

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers assumes for a key that a family's config.json leaves out, where families differ."""

REQUIRED_VALUES: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "attention_bias": (False, "the output projection of attention has no bias"),
    "mlp_bias": (False, "the MLP has no biases"),
    "attention_dropout": (0.0, "attention has no dropout"),
    "partial_rotary_factor": (1.0, "rotary embeddings turn the whole head"),
    "rope_interleaved": (False, "rotary pairs are the two halves of a head"),
    "use_sliding_window": (False, "attention sees the whole document"),
    "quantization_config": (None, "weights are plain floating-point tensors"),
    "num_local_experts": (None, "there is no mixture of experts"),
    "num_experts": (None, "there is no mixture of experts"),
}
"""Keys whose other values describe a model that cannot be built here: the value accepted and why."""


KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "max_position_embeddings", "sliding_window"),
        ),
        (lambda value: type(value) is int and 0 < value <= LARGEST_SIZE, f"a whole number from 1 to {LARGEST_SIZE}"),
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "initializer_range"),
        (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number, at least 0"),
    ),
    "tie_word_embeddings": (lambda value: type(value) is bool, "true or false"),
    "layer_types": (lambda value: isinstance(value, list), "a list"),
}
"""Keys whose values are read, and what they may be."""


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes, in the layout of transformers 5 (``rope_parameters``) or 4 (``rope_theta``).

    Raises CheckpointError naming the key, for a missing key and for everything this model does not have: sliding windows in use, partial
    rotary embeddings and those that change with the batch, mixtures of experts, biases outside q, k and v, activations other than silu.
    """
    family = hf.get("model_type")
    if family == OWN_TYPE:
        return read_own_config(hf)
    if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
        raise CheckpointError(f"config.json: model_type is {family!r}; accepted are {', '.join(FAMILY_DEFAULTS)} and {OWN_TYPE}")
    hf = {**FAMILY_DEFAULTS[family], **hf}
    _check_kinds(hf)
    _refuse_other_values(hf)
    _refuse_sliding_window(hf)
    hidden_size, num_heads = _require(hf, "hidden_size"), _require(hf, "num_attention_heads")
    head_dim, max_position = _default(hf, "head_dim", hidden_size // num_heads), _require(hf, "max_position_embeddings")
    theta, rope = rope_from_hf(hf, head_dim, max_position)
    try:
        return ModelConfig(
            vocab_size=_require(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_require(hf, "intermediate_size"),
            num_layers=_require(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_default(hf, "num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_position=max_position,
            rope_theta=theta,
            rope=rope,
            norm_eps=_default(hf, "rms_norm_eps", 1e-6),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            tie_embeddings=_default(hf, "tie_word_embeddings", False),
            init_std=_default(hf, "initializer_range", 0.02),
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json describes an impossible model: {error}") from error


def config_to_hf(
    config: ModelConfig, *, dtype: str, bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None
) -> dict[str, Any]:
    """The config.json of ``config``, whose weights are stored as ``dtype`` ("float32", "bfloat16" ...).

    The family is Qwen3 with query and key norms, Qwen2 with q, k and v biases, else Llama. Rotary settings are written in both the
    layout of transformers 5 and that of 4. Where no family has the model it is ``own_config``, which says what they lack.
    """
    beside = {"dtype": dtype, "torch_dtype": dtype, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    if no_family_has(config):
        return own_config(config, beside)
    family, architecture = _family(config)
    hf = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        **rope_to_hf(config.rope_theta, config.rope, config.head_dim, config.max_position),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **beside,
    }
    biases = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen2": {}, "qwen3": {"attention_bias": False}}
    window = {} if family == "llama" else {"use_sliding_window": False, "sliding_window": None}
    return {**hf, **biases[family], **window}


def _family(config: ModelConfig) -> tuple[str, str]:
    if config.qk_norm:
        return "qwen3", "Qwen3ForCausalLM"
    return ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")


def _refuse_other_values(hf: Mapping[str, Any]) -> None:
    for key, (accepted, reason) in REQUIRED_VALUES.items():
        if key in hf and hf[key] is not None and hf[key] != accepted:
            raise CheckpointError(f"config.json: {key} is {shown(hf[key])}; only {shown(accepted)} is supported: {reason}")


def _refuse_sliding_window(hf: Mapping[str, Any]) -> None:
    window = hf.get("sliding_window")
    if hf["model_type"] == "mistral" and window is not None and window < hf["max_position_embeddings"]:
        raise CheckpointError(
            f"config.json: sliding_window is {window}, below max_position_embeddings ({hf['max_position_embeddings']}), so it is in use; "
            "only null, or a window no smaller than that, is supported"
        )
    kinds = [kind for kind in hf.get("layer_types") or () if kind != "full_attention"]
    if kinds:
        raise CheckpointError(f"config.json: layer_types has {shown(kinds[0])}; only full_attention is supported")


def _check_kinds(hf: Mapping[str, Any]) -> None:
    """What is read of a config.json is of the kinds that it must be, or null."""
    for key, (fits, accepted) in KINDS.items():
        value = hf.get(key)
        if value is not None and not fits(value):
            raise CheckpointError(f"config.json: {key} is {shown(value)}; accepted: {accepted}")


def _require(hf: Mapping[str, Any], key: str) -> int:
    if hf.get(key) is None:
        raise CheckpointError(f"config.json: {key} is {hf.get(key)!r}; a number is needed")
    return hf[key]


def _default(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if hf.get(key) is None else hf[key]
