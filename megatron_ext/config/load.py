"""Read and write a run's configuration."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_ext.config.messages import config_error, problems_of
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.tree import ConfigTree, plain_value
from megatron_ext.model.options import ModelOptions
from megatron_ext.option_rules import Problem

_BESIDE_INIT_FROM = ("init_from", "attention")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file ``path``, apply ``dotted.path=value`` overrides in order, and check everything that needs no other file.

    Raises:
        ConfigError: with every problem found: path, place, value seen, what is accepted and the nearest key.
    """
    tree = ConfigTree.read(path)
    for assignment in overrides:
        tree.override(assignment)
    problems = list(_shape_beside_init_from(tree.values))
    try:
        # JSON is what pydantic is strict about without refusing lists for tuples and mappings for dataclasses.
        config = RunConfig.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        problems.extend(problems_of(error))
    if problems:
        raise config_error(problems, tree)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included, keys in the order of the schema; ``load_config`` reads it back equal."""
    values = config.model_dump(mode="json")
    if config.model.init_from is not None:
        values["model"] = {key: values["model"][key] for key in _BESIDE_INIT_FROM}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this package, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain_value(text) is text else "'")


_Dumper.add_representer(str, _represent_text)


def _shape_beside_init_from(values: dict[str, Any]) -> Iterator[Problem]:
    model = values.get("model")
    if not isinstance(model, dict) or model.get("init_from") is None:
        return
    for field in dataclasses.fields(ModelOptions):
        if field.name in model and field.name not in _BESIDE_INIT_FROM:
            yield Problem(f"model.{field.name}", model[field.name], "not set: with model.init_from the shape comes from that checkpoint")
