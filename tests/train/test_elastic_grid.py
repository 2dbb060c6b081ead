"""Which grid a run gets on the hosts that remain."""

from pathlib import Path

import pytest

from megatron_ext.config import RunConfig, load_config
from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.parallel.grid import GridShape
from megatron_ext.train.build import prepare
from megatron_ext.train.elastic_grid import Layout, choose_grid
from tests.train.tiny_run import write_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads, 2 key/value heads, 2 layers, inner size 48."""
    return write_run(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def model(config: Path) -> ModelConfig:
    return prepare(load_config(config)).model


def chosen(config: Path, model: ModelConfig, slots: dict[str, int], *overrides: str) -> Layout:
    def configure(more: list[str]) -> RunConfig:
        return load_config(config, [*overrides, *more])

    layout = choose_grid(configure, model, slots)
    assert sum(layout.ranks.values()) == layout.shape.size and all(layout.ranks[host] <= slots[host] for host in layout.ranks)
    return layout


@pytest.mark.parametrize(
    ("slots", "overrides", "expected"),
    [
        ({"a": 4, "b": 4}, ("parallel.tp=2", "parallel.pp=2"), Layout(GridShape(2, 2, 2), {"a": 4, "b": 4})),
        ({"b": 4}, ("parallel.tp=2", "parallel.pp=2"), Layout(GridShape(2, 1, 2), {"b": 4})),
        ({"a": 3, "b": 3}, (), Layout(GridShape(1, 6, 1), {"a": 3, "b": 3})),
        # Tensor-parallel neighbours stay on one host where they can.
        ({"a": 3, "b": 3}, ("parallel.tp=2",), Layout(GridShape(1, 2, 2), {"a": 2, "b": 2})),
        ({"a": 1, "b": 1}, ("parallel.tp=2",), Layout(GridShape(1, 1, 2), {"a": 1, "b": 1})),
        # No room as configured: three ranks neither divide the heads nor the layers, so two hold the model; tp stays what it was.
        ({"a": 3}, ("parallel.tp=2", "parallel.pp=2"), Layout(GridShape(1, 1, 2), {"a": 2}, ("parallel.pp=1",))),
        ({"a": 1}, ("parallel.tp=2",), Layout(GridShape(1, 1, 1), {"a": 1}, ("parallel.tp=1",))),
        (
            {"a": 1},
            ("parallel.tp=2", "parallel.sequence_parallel_activations=true"),
            Layout(GridShape(1, 1, 1), {"a": 1}, ("parallel.tp=1", "parallel.sequence_parallel_activations=false")),
        ),
        (
            {"a": 1},
            ("parallel.pp=2", "parallel.layers_per_stage=[1, 1]"),
            Layout(GridShape(1, 1, 1), {"a": 1}, ("parallel.pp=1", "parallel.layers_per_stage=null")),
        ),
        ({"a": 3}, ("planning={policy: static, degree: 4}",), Layout(GridShape(1, 3, 1), {"a": 3}, ("planning.degree=2",))),
    ],
)
def test_grid(config: Path, model: ModelConfig, slots: dict[str, int], overrides: tuple[str, ...], expected: Layout) -> None:
    assert chosen(config, model, slots, *overrides) == expected


def test_without_hosts_or_without_a_grid_it_says_so(config: Path, model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="no grid fits 0 ranks on 0 hosts: there is no host"):
        chosen(config, model, {})
