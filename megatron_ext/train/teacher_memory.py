"""How much memory a frozen teacher adds to a rank, from shapes alone."""

from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ext.checkpoint.hf import load_hf_config
from megatron_ext.config.objective_options import DistillationOptions, HiddenOptions
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.pipeline import Stage
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.train.teacher import teacher_stage


class TeacherMemory(NamedTuple):
    """Bytes that a teacher adds to those of a rank."""

    parameters: int = 0
    """Its weights."""
    activations: int = 0
    """Of a pack: what its losses keep for backward, and its residual stream where that came with the student's."""
    stream: int = 0
    """Of the last pack: its residual stream, which waits for the head or the next stage."""
    logits: int = 0
    """One chunk of both models' logits with what the divergence makes of them, its gradients, and the input of the teacher's head."""


def teacher_memory(
    options: DistillationOptions,
    model: ModelConfig,
    part: Stage,
    tp: TensorParallel,
    place: tuple[int, int],
    tokens: int,
    chunk: int,
    dtype: torch.dtype,
) -> TeacherMemory:
    """Memory of a teacher whose directory has its shape; of one that is not there yet, as if it had the student's.

    Args:
        options: of distillation.
        model: shape of the student.
        part: layers of the student on this rank.
        tp: of this rank.
        place: number of its stage, and of how many.
        tokens: of a pack, on this data rank.
        chunk: tokens whose logits exist at once.
        dtype: of both models.
    """
    there = (Path(options.teacher) / "config.json").is_file()
    shape = load_hf_config(options.teacher) if there else model
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    with torch.device("meta"):
        held = GPT(shape, tp=tp, stage=teacher_stage(shape, model, part, *place))
    outside = -(-tokens // tp.group.size) if tp.shard_tokens else tokens
    stream = outside * shape.hidden_size * size
    kept = 0 if options.hidden is None else _distances(options.hidden, model, part, outside, size)
    return TeacherMemory(
        parameters=size * sum(parameter.numel() for parameter in held.parameters()),
        activations=kept + stream * (not part.is_first),
        stream=stream,
        logits=_divergence(model, shape, tp, tokens, chunk, size, wide) if options.kl is not None and part.is_last else 0,
    )


def _distances(options: HiddenOptions, model: ModelConfig, part: Stage, outside: int, size: int) -> int:
    """What autograd keeps of the distances of hidden states on this stage."""
    last = model.num_layers
    depths = [last] if options.layers is None else options.layers
    here = [depth for depth in depths if depth - 1 in part.layers or (depth == 0 and part.is_first)]
    # The difference, or both states, float32 copies where they are not.
    wide = max(4, size)
    return len(here) * outside * model.hidden_size * (wide if options.kind == "mse" else 2 * wide)


def _divergence(model: ModelConfig, shape: ModelConfig, tp: TensorParallel, tokens: int, chunk: int, size: int, wide: int) -> int:
    rows = -(-model.vocab_size // tp.group.size)
    # Logits and exponentials of both models, both distributions, and their difference.
    logits = 7 * wide * min(chunk, tokens) * rows
    gradients = rows * model.hidden_size * (wide + size) + tokens * model.hidden_size * size
    return logits + gradients + tokens * shape.hidden_size * size
