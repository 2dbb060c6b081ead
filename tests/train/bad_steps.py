"""Runs in which some steps are bad: gradients of one rank that are not finite, steps that are refused, and ranks that are killed."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import load_config
from megatron_ext.data.corpus import Piece
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_grid, prepare
from megatron_ext.train.trainer import Trainer


def pieces_of_steps(config: Path, overrides: Sequence[str], first: int, last: int) -> list[list[Piece]]:
    """What an uninterrupted sampler gives for steps ``first`` to ``last``."""
    loaded = load_config(config, list(overrides))
    mixture = prepare(loaded).mixture
    return [mixture.take(loaded.data.tokens_per_step) for _ in range(last)][first - 1 :]


def train_badly(
    world: World,
    config: Path,
    overrides: Sequence[str] = (),
    poisoned: Sequence[list[Piece]] = (),
    refused: Sequence[int] = (),
    killed_in: tuple[int, int] | None = None,
) -> None:
    """``train``, with bad steps.

    Args:
        poisoned: steps that read exactly these pieces have a gradient on the last rank with one NaN.
        refused: numbers of steps that are not taken.
        killed_in: all ranks die in this step, once the run has gone back so often.
    """
    loaded = load_config(config, list(overrides))
    Path(loaded.run_dir).mkdir(parents=True, exist_ok=True)
    world.barrier()
    setup = prepare(loaded)
    trainer = Trainer(setup, build_grid(setup, world))
    spoils = [False]
    _spoil_gradients(trainer, spoils, active=world.rank == world.size - 1)
    take_step, judge = trainer.engine.step, trainer.guard.judge

    def step(packs: Any, *arguments: Any) -> Any:
        if (trainer.step, trainer.guard.rollbacks) == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        spoils[0] = list(packs.pieces) in list(poisoned)
        return take_step(packs, *arguments)

    trainer.engine.step = step
    trainer.guard.judge = lambda loss, grad_norm: judge(float("nan") if trainer.step in refused else loss, grad_norm)
    trainer.train()


def _spoil_gradients(trainer: Trainer, spoils: list[bool], active: bool) -> None:
    parameter = next(parameter for name, parameter in trainer.model.named_parameters() if name.endswith("down_proj.weight"))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[-1] = float("nan")
        return spoiled if active and spoils[0] else gradient

    parameter.register_hook(spoil)
