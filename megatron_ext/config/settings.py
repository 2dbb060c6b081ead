"""What a run was told, as flat keys, to say at a resume what is told otherwise now."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_type_hints

from megatron_ext.config.schema import RunConfig
from megatron_ext.option_rules import shown

_OF_THE_PLACE = ("run_dir", "checkpoint")
"""Where a run writes and resumes from, which is no setting of the training."""


class Change(NamedTuple):
    """A key whose value is not that of the checkpoint."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.before)} -> {shown(self.now)}"


def settings(config: RunConfig) -> dict[str, Any]:
    """Dotted keys and their values as JSON. A list, a mapping of names or a section that may be null is one value."""
    values = config.model_dump(mode="json")
    hints = {name: field.annotation for name, field in RunConfig.model_fields.items() if name not in _OF_THE_PLACE}
    return dict(_leaves(hints, values, ""))


def _leaves(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in hints.items():
        if is_dataclass(hint):
            yield from _leaves(get_type_hints(hint), values[name], f"{prefix}{name}.")
        else:
            yield prefix + name, values[name]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys of both whose values differ. A key that only one of two versions of the code has is no change."""
    return [Change(key, before[key], value) for key, value in now.items() if key in before and before[key] != value]
