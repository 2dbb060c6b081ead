"""Fixtures that all rooms share."""

import pytest
import torch
from hypothesis import settings

from tests import distributed
from tests.distributed import RunRanks

# The default of 200 ms an example measures what else the machine does.
settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """``run_ranks(size, function, *arguments)``: results of ``function(world, *arguments)`` on real gloo ranks, by rank."""
    return distributed.run_ranks


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share few cores with their ranks; more threads only wait for each other."""
    torch.set_num_threads(1)
