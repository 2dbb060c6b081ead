"""Rotary positions in a config.json: ``rope_parameters`` of transformers 5, ``rope_theta`` and ``rope_scaling`` of transformers 4."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, get_args

from megatron_ext.checkpoint.own_config import OWN_TYPE
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import DEFAULT_THETA
from megatron_ext.model.rope_options import RopeKind, RopeOptions
from megatron_ext.model.rope_scaling import RopeScaling, resolve_rope, yarn_attention_factor, yarn_by_ratio
from megatron_ext.option_rules import OptionError, shown

LARGEST = 1e18
"""Of any number of rotary positions."""
LAYOUTS = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"
NAMES: Mapping[str, str] = {
    **{name: name for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
    **{name: name for name in ("low_freq_factor", "high_freq_factor")},
    ORIGINAL: "original_max_position",
}
"""Keys in a config.json, and what ``RopeOptions`` calls them."""
WRITTEN: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", ORIGINAL, "beta_fast", "beta_slow"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
"""Keys that a config.json has for each kind."""
OTHER_KINDS: Mapping[str, str] = {
    "dynamic": "its angles change with the longest document of a batch, so that documents of one pack would reach each other; "
    "model.rope with kind ntk has them for a fixed factor, with kind default as they are up to max_position_embeddings",
    "longrope": "its angles change with the longest document of a batch, so that documents of one pack would reach each other; "
    "model.rope sets others",
}
"""Kinds that transformers has, and why there are none here."""


def rope_from_hf(hf: Mapping[str, Any], head_dim: int, max_position: int) -> tuple[float, RopeScaling]:
    """Base and scaling that a config.json describes, in whichever layout is present; both must agree.

    Raises:
        CheckpointError: names the key, for kinds that there are not here and for values that mean nothing.
    """
    places = {"config.json": hf, **dict(_layouts(hf))}
    bases = {_checked("rope_theta", place["rope_theta"], key) for key, place in places.items() if place.get("rope_theta") is not None}
    if len(bases) > 1:
        raise CheckpointError(f"config.json: rope_theta is given as {' and as '.join(map(str, sorted(bases)))}")
    found = [_options(hf, key, rope) for key, rope in _layouts(hf)]
    if len(set(found)) > 1:
        raise CheckpointError("config.json: rope_parameters and rope_scaling describe different positions")
    options = found[0] if found else None
    if options is not None and options.kind in ("yarn", "llama3") and options.original_max_position is None:
        options = replace(options, original_max_position=max_position)
    try:
        return resolve_rope(options, float(bases.pop()) if bases else DEFAULT_THETA, head_dim, max_position)
    except OptionError as error:
        raise CheckpointError(f"config.json: {error}") from error


def rope_to_hf(theta: float, scaling: RopeScaling, head_dim: int, max_position: int) -> dict[str, Any]:
    """The keys of a config.json for both layouts.

    Some releases of transformers 4 (4.53 is one) take ``max_position`` over the original length for the factor of yarn, whatever is
    written as the factor. So both are made to say the same; see ``no_family_has`` for what cannot be.
    """
    if scaling.kind == "yarn":
        by_ratio = yarn_by_ratio(scaling, head_dim, theta, max_position)
        assert by_ratio is not None, "other models have a config.json of their own"
        scaling = by_ratio
    values = asdict(scaling)
    rope = {"rope_type": scaling.kind, **{key: values[NAMES[key]] for key in WRITTEN[scaling.kind]}}
    if scaling.kind == "yarn" and scaling.attention_factor != yarn_attention_factor(scaling.factor):
        rope["attention_factor"] = scaling.attention_factor
    if not scaling.truncate:
        rope["truncate"] = False
    older = {} if scaling.kind == "default" else {"rope_scaling": rope}
    return {"rope_parameters": {**rope, "rope_theta": theta}, "rope_theta": theta, **older}


def scaling_kind(hf: Mapping[str, Any]) -> str:
    """What a config.json calls its scaling, whether or not there is such a kind here; ``default`` if there is none."""
    if hf.get("model_type") == OWN_TYPE:
        return str(hf.get("rope", {}).get("kind"))
    return next((kind for _, rope in _layouts(hf) if (kind := _kind(rope)) != "default"), "default")


def without_scaling(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model whose positions are those of the base alone."""
    if hf.get("model_type") == OWN_TYPE:
        return {**hf, "rope": asdict(RopeScaling())}
    scaling = {"rope_type", "type", "long_factor", "short_factor", *NAMES}
    return {**hf, **{key: {name: value for name, value in rope.items() if name not in scaling} for key, rope in _layouts(hf)}}


def _layouts(hf: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in LAYOUTS:
        rope = hf.get(key) or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"config.json: {key} is {shown(rope)}; an object is needed")
        yield from [(key, rope)] if rope else []


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _options(hf: Mapping[str, Any], key: str, rope: Mapping[str, Any]) -> RopeOptions:
    kind, kinds = _kind(rope), [kind for kind in get_args(RopeKind) if kind != "ntk"]
    if not isinstance(kind, str) or kind not in kinds:
        why = f": {OTHER_KINDS[kind]}" if isinstance(kind, str) and kind in OTHER_KINDS else ""
        raise CheckpointError(f"config.json: {key} has rope_type {shown(kind)}; supported are {', '.join(kinds)}{why}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"config.json: {key} has partial_rotary_factor {rope['partial_rotary_factor']}; only 1.0 is supported")
    if unknown := set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *NAMES}:
        raise CheckpointError(f"config.json: {key} has {', '.join(sorted(unknown))}, which is not supported")
    if kind in ("yarn", "llama3") and hf.get(ORIGINAL) is not None:
        rope = {**rope, ORIGINAL: hf[ORIGINAL]}
    values = {NAMES[name]: _checked(name, value, key) for name, value in rope.items() if name in NAMES and value is not None}
    if "attention_factor" in values or not (values.get("mscale") and values.get("mscale_all_dim")):
        # As in transformers, which reads the two only together.
        values = {name: value for name, value in values.items() if not name.startswith("mscale")}
    try:
        return RopeOptions(kind, **values)
    except OptionError as error:
        raise CheckpointError(f"config.json: {key}: {error}") from error


def _checked(name: str, value: Any, key: str) -> Any:
    accepted = (bool,) if name == "truncate" else (int, float)
    if type(value) not in accepted or not -LARGEST < value < LARGEST:
        raise CheckpointError(f"config.json: {key}: {name} is {shown(value)}; accepted: {accepted[-1].__name__}")
    return value
