"""The last checkpoints of every run of a study, averaged: losses of the mean of their weights beside each run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from study_measures import chosen_runs, measure_once

from megatron_ext.checkpoint.average import common_config, weighted_mean
from megatron_ext.checkpoint.directory import saved_steps
from megatron_ext.checkpoint.hf import hf_tensor_reader, in_order
from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.config.study import StudyAveraging, StudyRun
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.device import local_device
from megatron_ext.report.study import Variant
from megatron_ext.report.study_averaging import FILE
from megatron_ext.train.evaluation_packs import validation_packs
from megatron_ext.train.quantized_evaluation import mean_loss
from megatron_ext.train.quantized_model import build_rotated


def average_runs(options: StudyAveraging, planned: Sequence[StudyRun], variants: Sequence[Variant], console: Console) -> None:
    """Write ``FILE`` beside every run at the best value of its variant; what is there already and was made alike stays.

    Raises:
        CheckpointError: a run has fewer checkpoints, or one cannot be read.
        DataError: a validation corpus cannot be read.
    """
    for run in chosen_runs(planned, variants, "averaging", console):
        checkpoints = saved_steps(run.directory / "checkpoints")[-options.last :]
        if len(checkpoints) < options.last:
            raise CheckpointError(f"{run.directory}: {len(checkpoints)} checkpoints; accepted: averaging.last ({options.last}) or more")
        settings = {**options.model_dump(), "checkpoints": [checkpoint.name for checkpoint in checkpoints]}
        measure_once(run.directory / FILE, settings, partial(_losses, run, checkpoints))


def _losses(run: StudyRun, checkpoints: Sequence[Path]) -> dict[str, float]:
    """Loss of the averaged model on each validation corpus of the run, as far as the run itself evaluates it."""
    for checkpoint in checkpoints:
        check_undamaged(checkpoint)
    shape = common_config(checkpoints)
    read = weighted_mean([hf_tensor_reader(checkpoint, shape) for checkpoint in checkpoints], [1.0] * len(checkpoints))
    weights = {name: tensor.float() for name, tensor in in_order(read, shape)}
    device = local_device()
    model = build_rotated(weights, shape, "none", 0, device, next(iter(weights.values())).dtype)
    packs = validation_packs(run.config.data, run.config.evaluation.tokens, shape.vocab_size)
    return {name: mean_loss(model, [pack.to(device) for pack in of_source]) for name, of_source in packs.items()}
