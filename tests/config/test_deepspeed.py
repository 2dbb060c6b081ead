"""The derived DeepSpeed configuration, judged by DeepSpeed itself."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from deepspeed.monitor.config import get_monitor_config
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from megatron_ext.config import RunConfig, deepspeed_config, monitor_config
from megatron_ext.config.deepspeed_keys import OWNED, PASSED_THROUGH
from megatron_ext.errors import ConfigError

Load = Callable[..., RunConfig]


def test_deepspeed_accepts_it_and_understands_it_as_meant(load: Load) -> None:
    derived = deepspeed_config(load("deepspeed.wall_clock_breakdown=true", "optimizer.clip_norm=0.5"), data_ranks=1)
    understood = DeepSpeedConfig(copy.deepcopy(derived))
    assert (understood.train_batch_size, understood.train_micro_batch_size_per_gpu, understood.gradient_accumulation_steps) == (1, 1, 1)
    assert understood.managed_gradient_accumulation is False
    assert understood.gradient_clipping == 0, "the global norm is clipped by our optimizer, once"
    assert understood.zero_optimization_stage == 0
    assert not understood.bfloat16_config.enabled
    assert not understood.float16_config.enabled
    assert understood.optimizer_name is None
    assert understood.scheduler_name is None
    assert understood.wall_clock_breakdown is True
    assert understood.steps_per_print > 10**12
    assert not understood.monitor_config.enabled, "the pipeline engine would write events of its own"


def test_batch_of_many_ranks_is_consistent(load: Load) -> None:
    derived = deepspeed_config(load(), data_ranks=6)
    assert derived["train_batch_size"] == 6 * derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"]


def test_tensorboard_follows_logging(load: Load) -> None:
    assert get_monitor_config(monitor_config(load())).tensorboard.output_path == "runs/small"
    assert get_monitor_config(monitor_config(load())).enabled is True
    assert get_monitor_config(monitor_config(load("logging.tensorboard=false"))).enabled is False


def test_other_monitors_are_passed_to_the_monitors_alone(load: Load) -> None:
    config = load("deepspeed={csv_monitor: {enabled: true, output_path: somewhere}}")
    assert get_monitor_config(monitor_config(config)).csv_monitor.output_path == "somewhere"
    assert "csv_monitor" not in deepspeed_config(config, 1)


@pytest.mark.parametrize(("stages", "managed"), [(1, False), (2, True)])
def test_only_a_pipeline_manages_its_boundaries(load: Load, stages: int, managed: bool) -> None:
    understood = DeepSpeedConfig(copy.deepcopy(deepspeed_config(load(f"parallel.pp={stages}"), 1)))
    assert understood.managed_gradient_accumulation is managed
    assert understood.pipeline["pipe_partitioned"] is understood.pipeline["grad_partitioned"] is False


def test_the_rest_is_passed_through(load: Load) -> None:
    section = {"comms_logger": {"enabled": True, "verbose": False}, "memory_breakdown": True}
    derived = deepspeed_config(load("deepspeed={comms_logger: {enabled: true, verbose: false}, memory_breakdown: true}"), 1)
    assert {key: derived[key] for key in section} == section


@pytest.mark.parametrize("key", sorted(OWNED))
def test_a_key_that_is_ours_is_refused_with_what_decides_it(load: Load, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"deepspeed.{key}=1")
    assert str(error.value) == f"command line: deepspeed.{key}: 1; accepted: no value here, it is {OWNED[key]}"


def test_clipping_is_refused_in_favour_of_our_key(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.gradient_clipping: 1; accepted: no value here, it is set by optimizer\.clip_norm$"):
        load("deepspeed.gradient_clipping=1")


def test_every_key_that_we_derive_is_ours(load: Load) -> None:
    assert set(deepspeed_config(load(), 1)) <= set(OWNED)
    assert not set(OWNED) & set(PASSED_THROUGH)


def test_unknown_key_is_refused_with_the_nearest(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.coms_logger: no such key .*; nearest: comms_logger$"):
        load("deepspeed.coms_logger={enabled: true}")


class _Asked(dict):
    """A dictionary that remembers which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> "_Asked":
        return self

    def __copy__(self) -> "_Asked":
        return self


def test_lists_of_keys_are_those_that_the_installed_deepspeed_reads(load: Load) -> None:
    derived = _Asked(deepspeed_config(load(), 1))
    DeepSpeedConfig(derived)
    ours = set(OWNED) | set(PASSED_THROUGH)
    assert set(PASSED_THROUGH) <= derived.asked, "a key that DeepSpeed no longer reads"
    for key in derived.asked - ours:
        with pytest.raises(DeepSpeedConfigError, match="removed"):
            DeepSpeedConfig({**deepspeed_config(load(), 1), key: {}})
