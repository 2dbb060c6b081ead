"""A run from a configuration: check, join the other ranks, train."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.atomic_io import atomic_open
from megatron_ext.config import RunConfig, dump_config, monitor_config
from megatron_ext.errors import StorageError
from megatron_ext.parallel.device import works_beside_host
from megatron_ext.parallel.hang import HangWatch
from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.shared_directory import prove_shared, prove_writable
from megatron_ext.parallel.world import COLLECTIVE_TIMEOUT, World, join_world, launched_ranks
from megatron_ext.train.build import Setup, build_grid, prepare, run_shape
from megatron_ext.train.console import say
from megatron_ext.train.events import append_event
from megatron_ext.train.monitors import check_monitors
from megatron_ext.train.profile import check_ranks
from megatron_ext.train.rank_log import RankLog
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
    check_ranks(config.logging.profile, launched_ranks()[1])
    check_monitors(monitor_config(config))
    if launched_ranks()[0] == 0:
        prove_writable(Path(config.run_dir))
    world = join_world(config.train.threads_per_rank)
    world.activity.begin("start")
    heartbeat = Heartbeat(world, config.train.heartbeat_timeout, _hang_watch(config, world), partial(_tell, config, world))
    try:
        _train(setup, world, heartbeat)
        heartbeat.close()
    except BaseException as error:
        heartbeat.fail(error)
        raise
    # Only after a good end: a rank that failed would wait here for ranks that wait for it.
    dist.destroy_process_group()


def _hang_watch(config: RunConfig, world: World) -> HangWatch | None:
    timeout = config.train.hang_timeout
    return None if timeout is None else HangWatch(timeout, COLLECTIVE_TIMEOUT.total_seconds(), works_beside_host(world.device))


def _train(setup: Setup, world: World, heartbeat: Heartbeat) -> None:
    run_dir = Path(setup.config.run_dir)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir, world) as lock, RankLog(run_dir, world), _told(setup.config, world, heartbeat):
        if world.is_main:
            forget_request(run_dir)
        prove_shared(run_dir, world)
        trainer = Trainer(setup, build_grid(setup, world), lock)
        if world.is_main:
            with atomic_open(run_dir / CONFIG_FILE) as file:
                file.write(dump_config(setup.config))
        trainer.train()


@contextmanager
def _told(config: RunConfig, world: World, heartbeat: Heartbeat) -> Iterator[None]:
    """Where an error goes through, the rank that had the first of all ranks writes an event."""
    try:
        yield
    except BaseException as error:
        if heartbeat.fail(error):
            _tell(config, world, "failure", {"rank": world.rank, "what": f"{type(error).__name__}: {error}"[:1000]})
        raise


def _tell(config: RunConfig, world: World, event: str, details: dict[str, Any]) -> None:
    """Write what ended the run, where it has got as far as having a directory. Where that cannot be, it is no error beside that one."""
    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        return
    try:
        append_event(run_dir, event, step=world.activity.now.step, **details)
    except StorageError as error:
        say(f"{error}: {event} {details}", sys.stderr)
