"""Read and write the configuration of a run."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ext.config.messages import problems_of
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.tree import ConfigTree
from megatron_ext.config.yaml_text import render
from megatron_ext.errors import ConfigError
from megatron_ext.model.options import ModelOptions
from megatron_ext.option_rules import Problem, shown

_BESIDE_INIT_FROM = ("init_from", "max_position", "rope_theta", "rope", "attention", "evaluation_window", "norm_backend")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file ``path``, apply ``dotted.path=value`` overrides in order, and check all that needs no other file.

    Raises:
        ConfigError: with a line for every problem: where it was written, dotted path, value seen, what is accepted, nearest key.
    """
    tree = ConfigTree.read(path)
    for assignment in overrides:
        tree.override(assignment)
    problems = list(_shape_beside_init_from(tree.values))
    try:
        # Given JSON, pydantic is strict about types and yet takes a list for a tuple and a mapping for a dataclass.
        config = RunConfig.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        problems.extend(problems_of(error))
    if problems:
        raise ConfigError("\n".join(f"{tree.place(problem.key)}: {problem}" for problem in problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included, in the order of the schema; ``load_config`` reads it back equal."""
    values = config.model_dump(mode="json")
    if config.model.init_from is not None:
        values["model"] = {key: values["model"][key] for key in _BESIDE_INIT_FROM}
    return render(values)


def _shape_beside_init_from(values: dict[str, Any]) -> Iterator[Problem]:
    """The keys of the model section that a checkpoint decides. Seen only before defaults are filled in."""
    model = values.get("model")
    if not isinstance(model, dict) or model.get("init_from") is None:
        return
    for field in dataclasses.fields(ModelOptions):
        if field.name in model and field.name not in _BESIDE_INIT_FROM:
            yield Problem(f"model.{field.name}", shown(model[field.name]), "not set, because the shape comes from model.init_from")
