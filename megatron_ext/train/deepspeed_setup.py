"""What DeepSpeed is told of the ranks, and what of its insides is touched to start it.

Read from deepspeed 0.19.8: on a CPU it would compile a shared-memory collective at start, for minutes and with a compiler that a user need
not have; ``deepspeed.ops.__compatible_ops__`` says no to it.
"""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from functools import cached_property

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from megatron_ext.parallel.device import collective_backend
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.world import World


def join_deepspeed(world: World) -> None:
    """Let DeepSpeed use the process group that exists."""
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    deepspeed.init_distributed(collective_backend(world.device), auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """DeepSpeed's pipeline prints its topology and layers to standard output; the banner says the same."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class GridForDeepSpeed:
    """The grid under the names by which DeepSpeed asks a model-parallel unit, for one pipeline stage."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_data_parallel_rank(self) -> int:
        """Place among the ranks with the same part of the model."""
        return self._grid.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks with the same part of the model."""
        return self._grid.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with the same part of the model."""
        return self._grid.dp.handle or self._alone

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks that make up a model."""
        return self._grid.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that make up a model."""
        return self._grid.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that make up a model."""
        return self._grid.tp.handle or self._alone

    @cached_property
    def _alone(self) -> dist.ProcessGroup:
        """This rank only. Made once: DeepSpeed asks for each parameter, and every group of gloo has threads that never rest."""
        return dist.new_group([self._grid.world.rank], use_local_synchronization=True)
