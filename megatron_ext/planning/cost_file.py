"""Cost models as JSON: what calibration writes, runs read and checkpoints keep."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.json_text import parse_json
from megatron_ext.option_rules import shown
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve

FORMAT_VERSION = 1
LARGEST = 1e300
"""Of any number: sums and products of several stay finite where they are of use."""


def cost_to_json(cost: CostModel) -> dict[str, Any]:
    """Every field by name; curves and the shape of attention as objects."""
    return {"format": FORMAT_VERSION, **asdict(cost)}


def cost_from_json(values: Any, name: str) -> CostModel:
    """Inverse of ``cost_to_json``; fields that are missing keep their defaults.

    Raises:
        ConfigError: naming ``name``, the key, what was seen and what is accepted.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT_VERSION:
        seen = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{name}: format is {shown(seen)}; accepted: JSON with format {FORMAT_VERSION}, as tools/calibrate.py writes")
    values = {key: value for key, value in values.items() if key not in ("format", "about")}
    _known(values, CostModel, name)
    if not isinstance(values.get("tokens_per_rank"), int) or not 1 <= values["tokens_per_rank"] < 2**63:
        raise ConfigError(f"{name}: tokens_per_rank is {shown(values.get('tokens_per_rank'))}; accepted: a number of tokens, at least 1")
    converted: dict[str, Any] = {"tokens_per_rank": values.pop("tokens_per_rank")}
    for key, value in values.items():
        where = f"{name}: {key}"
        if key == "attention":
            converted[key] = _shape(value, where)
        elif key == "all_to_all":
            converted[key] = tuple(_curve(each, f"{where}[{number}]") for number, each in enumerate(_list(value, where)))
        elif key == "ring_step":
            converted[key] = _curve(value, where)
        elif key.startswith("efficiency"):
            converted[key] = _numbers(value, where)
        else:
            converted[key] = _number(value, where)
    rates, lengths = converted.get("efficiency", ()), converted.get("efficiency_tokens", ())
    if len(rates) != len(lengths) or not all(0 < rate <= 1 for rate in rates) or list(lengths) != sorted(set(lengths)):
        raise ConfigError(f"{name}: efficiency is {rates} at {lengths}; accepted: shares in (0, 1], one for each of some ascending lengths")
    return CostModel(**converted)


def load_cost_model(path: str) -> CostModel:
    """Read a cost model. Raises ConfigError naming the file and what is wrong in it."""
    try:
        values = parse_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"planning.cost_model is {path!r}, which is no readable JSON ({error}); tools/calibrate.py writes one") from error
    return cost_from_json(values, path)


def _known(values: dict[str, Any], kind: type, name: str) -> None:
    accepted = [field.name for field in fields(kind)]
    unknown = sorted(set(values) - set(accepted))
    if unknown:
        raise ConfigError(f"{name}: unknown key {shown(unknown[0])}; accepted: {', '.join(accepted)}")


def _shape(value: Any, where: str) -> AttentionShape:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {shown(value)}; accepted: an object")
    _known(value, AttentionShape, where)
    for key, each in value.items():
        if not isinstance(each, int) or each < (0 if key == "layers" else 1):
            raise ConfigError(f"{where}.{key} is {shown(each)}; accepted: a whole number, at least {0 if key == 'layers' else 1}")
    return AttentionShape(**value)


def _curve(value: Any, where: str) -> Curve:
    if not isinstance(value, dict) or set(value) != {"bytes", "seconds"}:
        raise ConfigError(f"{where} is {shown(value)}; accepted: an object with bytes and seconds")
    sent, seconds = _numbers(value["bytes"], f"{where}.bytes"), _numbers(value["seconds"], f"{where}.seconds")
    if len(sent) != len(seconds) or list(sent) != sorted(set(sent)):
        raise ConfigError(f"{where} has {len(sent)} bytes for {len(seconds)} seconds; accepted: as many, the bytes ascending")
    return Curve(sent, seconds)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is {shown(value)}; accepted: a list")
    return list(value)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    return tuple(_number(each, f"{where}[{number}]") for number, each in enumerate(_list(value, where)))


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise ConfigError(f"{where} is {shown(value)}; accepted: a number, at least 0")
    return float(value)
