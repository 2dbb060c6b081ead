"""A run from a configuration: check, join the other ranks, train."""

from pathlib import Path

import torch.distributed as dist

from megatron_ext.atomic_io import atomic_open
from megatron_ext.config import RunConfig, dump_config
from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.shared_directory import prove_shared
from megatron_ext.parallel.world import World, join_world, launched_ranks
from megatron_ext.train.build import Setup, build_grid, prepare, run_shape
from megatron_ext.train.run_lock import RunLock
from megatron_ext.train.sources import CONFIG_FILE
from megatron_ext.train.stopping import forget_request
from megatron_ext.train.trainer import Trainer


def pretrain(config: RunConfig) -> None:
    """Train as ``config`` says, on the ranks that the launcher started, or in this process alone.

    Raises:
        ConfigError, DataError: before any process group exists.
        CheckpointError: a checkpoint cannot be read or written.
    """
    setup = prepare(config)
    run_shape(config, setup.model, launched_ranks()[1])
    world = join_world(config.train.threads_per_rank)
    heartbeat = Heartbeat(world, config.train.heartbeat_timeout)
    try:
        _train(setup, world)
        heartbeat.close()
    except BaseException as error:
        heartbeat.fail(error)
        raise
    # Only after a good end: a rank that failed would wait here for ranks that wait for it.
    dist.destroy_process_group()


def _train(setup: Setup, world: World) -> None:
    run_dir = Path(setup.config.run_dir)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir, world) as lock:
        if world.is_main:
            forget_request(run_dir)
        prove_shared(run_dir, world)
        trainer = Trainer(setup, build_grid(setup, world), lock)
        if world.is_main:
            with atomic_open(run_dir / CONFIG_FILE) as file:
                file.write(dump_config(setup.config))
        trainer.train()
