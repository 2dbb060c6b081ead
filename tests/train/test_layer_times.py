from dataclasses import replace

import pytest

from megatron_ext.model.config import ModelConfig
from megatron_ext.parallel.world import World
from megatron_ext.train.layer_times import LayerTimes, measure_layers
from tests.distributed import RunRanks
from tests.grids import ALONE

MODEL = ModelConfig(64, 32, 48, 2, 4, 2, 8, 64)


def times_on(world: World) -> LayerTimes:
    return measure_layers(MODEL, 64, world)


def test_all_ranks_divide_by_the_same_times(run_ranks: RunRanks) -> None:
    first, second = run_ranks(2, times_on)
    assert first == second and min(first.embedding, first.block, first.head) > 0


def test_a_larger_head_takes_longer() -> None:
    heads = [measure_layers(replace(MODEL, vocab_size=size), 512, ALONE).head for size in (64, 16384)]
    assert heads[1] > 3 * heads[0]


@pytest.mark.parametrize("times", [LayerTimes(0.5, 0.25, 1.0)])
def test_times_for_people(times: LayerTimes) -> None:
    assert str(times) == "embedding 0.5 s, block 0.25 s, head 1 s"
