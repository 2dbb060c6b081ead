"""Fixtures that all rooms share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.distributed import RankPools

# The default of 200 ms an example measures what else the machine does.
settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RankPools]:
    """``run_ranks(size, function, *arguments)``: results of ``function(world, *arguments)`` on real gloo ranks, by rank."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture
def fresh_ranks() -> Iterator[RankPools]:
    """As ``run_ranks``, on ranks that have run nothing else: DeepSpeed's ZeRO looks at the grid of the last engine of its process."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share few cores with their ranks; more threads only wait for each other."""
    torch.set_num_threads(1)
