"""The methods that change updates, as a configuration asks for them."""

from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.output_magnitudes import OutputMagnitudes
from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.half_fine_tuning import HalfFineTuning
from megatron_ext.optim.magnitude_gate import MagnitudeGate
from megatron_ext.optim.meta_experience_replay import MetaExperienceReplay
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.grid import Grid


def update_extensions(model: GPT, options: OptimizerOptions, grid: Grid, seed: int) -> list[UpdateExtension]:
    """The methods that ``options`` switch on, in the order in which they act; what they need to see of ``model`` is seen from now on."""
    extensions: list[UpdateExtension] = []
    if options.half_fine_tuning is not None:
        extensions.append(HalfFineTuning(parameter_shapes(model.config), seed, options.half_fine_tuning.stage_steps))
    if options.magnitude_gate is not None:
        magnitudes = OutputMagnitudes(model)
        extensions.append(MagnitudeGate(lambda: magnitudes.take(grid.world.sum), options.magnitude_gate.threshold))
    if options.meta_experience_replay is not None:
        extensions.append(MetaExperienceReplay(options.meta_experience_replay.every, options.meta_experience_replay.factor))
    return extensions
