"""A run from a configuration: check, join the other ranks, train."""

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_ext.atomic_io import atomic_open
from megatron_ext.config import RunConfig, dump_config, summary
from megatron_ext.parallel.device import choose_dtype, local_device
from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.shared_directory import prove_shared
from megatron_ext.parallel.world import World, join_world, launched_ranks
from megatron_ext.train.banner import describe_stages
from megatron_ext.train.build import Setup, build_grid, prepare, run_shape
from megatron_ext.train.memory import largest_rank
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
    run_shape(setup, launched_ranks()[1])
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
        forget_request(run_dir)
    prove_shared(run_dir, world)
    trainer = Trainer(setup, build_grid(setup, world))
    if world.is_main:
        with atomic_open(run_dir / CONFIG_FILE) as file:
            file.write(dump_config(setup.config))
    trainer.train()


def dry_run(config: RunConfig) -> str:
    """What a run would be: the resolved configuration, the token budget and the layout. Reads data and model shape, starts nothing."""
    setup = prepare(config)
    _, size = launched_ranks()
    shape = run_shape(setup, size)
    text = summary(config, str(shape), setup.model.num_parameters())
    dtype, _ = choose_dtype(config.train.dtype, local_device())
    stage, memory = largest_rank(config, setup.model, shape, dtype)
    parts = ", ".join(f"{name} {value / 2**30:.3g}" for name, value in asdict(memory).items())
    text += f"memory           about {memory.total / 2**30:.3g} GiB of tensors on a rank of stage {stage} ({parts})\n"
    rows = []
    budget, corpora = setup.token_budget, setup.mixture.corpora
    for corpus, expected in zip(corpora, setup.mixture.expected_tokens(budget), strict=True):
        epochs = expected / corpus.num_tokens
        rows.append(f"  {corpus.name}: {expected / budget:.1%} of the tokens, {corpus.num_tokens:,} in the corpus, {epochs:.2f} epochs")
    text += "sources\n" + "\n".join(rows)
    if len(setup.mixture.stages) > 1:
        text += "\nstages\n" + "\n".join(f"  {line}" for line in describe_stages(setup))
    return text
