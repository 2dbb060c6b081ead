"""The final models of a study, quantized: their losses beside each run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from study_measures import chosen_runs, measure_once

from megatron_ext.checkpoint.load import find_checkpoint
from megatron_ext.config.study import StudyQuantization, StudyRun
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.device import local_device
from megatron_ext.precision.post_training import named_scheme
from megatron_ext.report.study import Variant
from megatron_ext.report.study_quantization import FILE
from megatron_ext.train.evaluation_packs import evaluation_packs
from megatron_ext.train.quantized_evaluation import quantized_losses
from megatron_ext.train.quantized_model import build_rotated, read_weights


def check_schemes(path: Path, options: StudyQuantization) -> None:
    """Raises ConfigError where the study at ``path`` names a scheme that there is not."""
    for number, name in enumerate(options.schemes):
        try:
            named_scheme(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: quantization.schemes.{number}: {error}") from None


def quantize_runs(options: StudyQuantization, planned: Sequence[StudyRun], variants: Sequence[Variant], console: Console) -> None:
    """Write ``FILE`` beside every run at the best value of its variant; what is there already and was made alike stays.

    Raises:
        DataError: the validation corpus cannot be read.
        CheckpointError: the run's last checkpoint cannot be.
    """
    for run in chosen_runs(planned, variants, "quantizing", console):
        checkpoint = find_checkpoint(run.directory / "checkpoints", "auto")
        assert checkpoint is not None, "a finished run has saved"
        data = options.data or run.config.data.validation[0].path
        settings = {**options.model_dump(), "data": data, "checkpoint": checkpoint.name}
        measure_once(run.directory / FILE, settings, partial(_losses, options, run, checkpoint, data))


def _losses(options: StudyQuantization, run: StudyRun, checkpoint: Path, data: str) -> dict[str, float]:
    weights, shape = read_weights(checkpoint)
    device = local_device()
    model = build_rotated(weights, shape, "none", 0, device, next(iter(weights.values())).dtype)
    length = run.config.data.longest_sequence
    packs = [pack.to(device) for pack in evaluation_packs(data, checkpoint, length, options.tokens, shape.vocab_size)]
    return {each.scheme: each.loss for each in quantized_losses(model, [named_scheme(name) for name in options.schemes], packs)}
