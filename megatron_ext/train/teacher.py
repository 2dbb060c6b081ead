"""The teacher of a run: read from its checkpoint and divided over the ranks as the model is."""

from pathlib import Path

import torch

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights
from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.config import RunConfig
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.pipeline import Stage, balanced, stages
from megatron_ext.train.distillation import Distillation


def build_distillation(config: RunConfig, model: GPT, sources: list[str], grid: Grid) -> Distillation | None:
    """The teacher beside this rank's part of ``model``; None where the configuration wants none. ``sources``: names of all, in order."""
    options = config.distillation
    if options is None:
        return None
    parameter = next(model.parameters())
    check_undamaged(Path(options.teacher), grid.world)
    shape = load_hf_config(options.teacher)
    attention, _ = select_backend(config.model.attention, parameter.device, parameter.dtype, shape.head_dim)
    with torch.device("meta"):
        stage = teacher_stage(shape, model.config, model.stage, grid.stage, grid.shape.pp)
        teacher = GPT(shape, attention, tp=model.tp, stage=stage).to(parameter.dtype)
    teacher.to_empty(device=parameter.device)
    load_hf_weights(teacher, options.teacher, grid.world.activity.move)
    factor = 1.0 if config.optimizer.sharding == "whole_tensor" else float(grid.shape.dp)
    return Distillation(model, teacher, options, sources, grid, factor)


def teacher_stage(shape: ModelConfig, student: ModelConfig, part: Stage, stage: int, pp: int) -> Stage:
    """The teacher's layers beside the student's ``part``: the same, so that hidden states meet; of another depth, as parameters weigh."""
    if shape.num_layers == student.num_layers:
        return part
    weights = shape.block_parameters, shape.embedding_parameters, shape.embedding_parameters
    return stages(balanced(shape.num_layers, pp, *weights))[stage]
