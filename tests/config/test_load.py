"""Files to configurations and back."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config import RunConfig, dump_config, load_config, total_steps
from megatron_ext.errors import ConfigError

Load = Callable[..., RunConfig]


def test_smallest_file_gets_the_defaults_of_the_rooms(load: Load) -> None:
    config = load()
    assert config.data.sources[0].name == "prose"
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.model.hidden_size == 256
    assert config.deepspeed == {}


def test_overrides_reach_every_kind_of_value(load: Load) -> None:
    config = load(
        "optimizer.lr=3e-4", "data.sources.0.weight=2", "optimizer.betas=[0.8, 0.9]", "data.replay.run=earlier", "data.replay.share=.25"
    )
    assert config.optimizer.lr == 3e-4
    assert config.data.sources[0].weight == 2.0
    assert config.optimizer.betas == (0.8, 0.9)
    assert dataclasses.asdict(config.data.replay) == {"share": 0.25, "run": "earlier", "sources": [], "decay": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: no such key (its value: 1); accepted: rule, routes, lr, *; nearest: lr"),
        ("optimiser.lr=1", "optimiser: no such key (its value: {'lr': 1}); accepted: run_dir, *; nearest: optimizer"),
        ("warmup_step=1", "warmup_step: no such key (its value: 1); accepted: run_dir, *; nearest: schedule.warmup_steps"),
        ("lr=1", "lr: no such key (its value: 1); accepted: run_dir, *; nearest: optimizer.lr"),
        (
            "data.sources.0.wait=1",
            "data.sources.0.wait: no such key (its value: 1); accepted: name, path, weight, *; nearest: weight",
        ),
        (
            "data.replay={run: r, share: 0.1, shares: 3}",
            "data.replay.shares: no such key (its value: 3); accepted: share, run, sources, decay; nearest: share",
        ),
        ("train.zzz=1", "train.zzz: no such key (its value: 1); accepted: steps, tokens, *"),
    ],
)
def test_unknown_key_names_the_known_and_the_nearest(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert re.fullmatch(re.escape(f"command line: {message}").replace(r"\*", "[^;]*"), str(error.value))


def test_all_problems_are_reported_together_with_their_places(config_file: Path) -> None:
    text = config_file.read_text().replace("steps: 100", "steps: many").replace("run_dir: runs/small\n", "") + "optimizer:\n  lr: -1\n"
    config_file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(config_file, ["model.num_head=8", "deepspeed.optimizer=Adam"])
    assert [line.split(";")[0] for line in str(error.value).splitlines()] == [
        f"{config_file}: run_dir: not set",
        "command line: model.num_head: no such key (its value: 8)",
        f"{config_file} line 10: optimizer.lr: -1.0",
        f"{config_file} line 8: train.steps: 'many'",
        "command line: deepspeed.optimizer: 'Adam'",
    ]


def test_resolved_yaml_is_read_back_equal(load: Load, tmp_path: Path) -> None:
    config = load(
        "run_dir='1e9'",
        "tokenizer='no'",
        "data.replay={share: 0.1, sources: [{name: '3e-4', path: 'a: b', weight: 0.5}]}",
        "optimizer.eps=1e-12",
        "train={tokens: 1e9}",
        "deepspeed={wandb: {enabled: false, team: '007'}, wall_clock_breakdown: true}",
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config), "utf-8")
    assert load_config(resolved) == config
    assert dump_config(load_config(resolved)) == dump_config(config)
    assert list(yaml.safe_load(resolved.read_text())) == list(RunConfig.model_fields)


def test_resolved_yaml_leaves_the_shape_to_the_checkpoint(load: Load, tmp_path: Path) -> None:
    config = load("model={init_from: hf, attention: dense}")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config), "utf-8")
    assert yaml.safe_load(resolved.read_text())["model"] == {
        "init_from": "hf",
        "max_position": None,
        "rope_theta": None,
        "rope": None,
        "attention": "dense",
        "evaluation_window": None,
        "norm_backend": "torch",
    }
    assert load_config(resolved) == config


def test_resolved_yaml_shows_every_option(load: Load) -> None:
    def names(value: Any) -> Any:
        return {key: names(item) for key, item in value.items()} if isinstance(value, dict) else None

    config = load()
    options = {name: getattr(config, name) for name in RunConfig.model_fields}
    expected = {name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for name, value in options.items()}
    assert names(yaml.safe_load(dump_config(config))) == names(expected)


@pytest.mark.parametrize(
    ("train", "steps"), [("steps: 7", 7), ("tokens: 1", 1), ("tokens: 1024", 1), ("tokens: 1025", 2), ("tokens: 1e6", 977)]
)
def test_total_steps_cover_the_budget(load: Load, train: str, steps: int) -> None:
    assert total_steps(load(f"train={{{train}}}")) == steps


WORDS = sorted(
    {*RunConfig.model_fields, "sources", "share", "run", "lr", "steps", "tokens", "kind", "name", "path", "weight", "sequence_length"}
)
"""Real keys among the garbage, so that it reaches deep into the schema."""
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([1, 1024, "wsd", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(document=st.dictionaries(st.sampled_from(WORDS), GARBAGE, max_size=8))
def test_any_document_is_a_configuration_or_a_config_error(tmp_path: Path, document: dict[str, Any]) -> None:
    _assert_config_or_config_error(tmp_path, yaml.safe_dump(document).encode())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(alphabet="ab:{}[]-!&*#'\"|>%@`,.?\n \t01e", max_size=60).map(str.encode))
def test_any_bytes_are_a_configuration_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    _assert_config_or_config_error(tmp_path, content)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(WORDS), tail=st.sampled_from(["", ".0", ".lr", ".sources", ".0.name", ".."]), value=st.text(max_size=12))
def test_any_override_gives_a_configuration_or_a_config_error(config_file: Path, key: str, tail: str, value: str) -> None:
    _assert_config_or_config_error(config_file.parent, config_file.read_bytes(), [f"{key}{tail}={value}"])


def _assert_config_or_config_error(folder: Path, content: bytes, overrides: list[str] | None = None) -> None:
    path = folder / "garbage.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path, overrides or [])
    except ConfigError as error:
        assert "accepted: " in str(error)
    else:
        path.write_text(dump_config(config), "utf-8")
        assert load_config(path) == config
