"""How much memory a rank needs, from shapes alone, and which grids of a number of devices fit."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.loss import chunk_tokens
from megatron_ext.model.parallel_limits import check_divides
from megatron_ext.optim.routing import route
from megatron_ext.optim.sharded import BUCKET_BYTES
from megatron_ext.parallel.device import local_device
from megatron_ext.parallel.grid import GridShape
from megatron_ext.parallel.group import Group, Traffic
from megatron_ext.parallel.options import ParallelOptions
from megatron_ext.parallel.pipeline import Stage, balanced, stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.train.code_memory import stashed, weight_codes
from megatron_ext.train.teacher_memory import TeacherMemory, teacher_memory

MOMENTS = {"adamw": 2, "adamp": 2, "muon": 1, "normuon": 1}
"""Moments of the rules, each as large as the master weights."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of tensors of one rank at the end of the last forward pass and after."""

    parameters: int
    """And, in low precision, the codes of the weights by rows and by columns; and those of a teacher."""
    gradients: int
    """Main gradients: float32 where parameters are bfloat16."""
    optimizer: int
    """Master weights, where they are not the parameters themselves, moments, and what methods keep of the weights."""
    activations: int
    """What backward needs of all packs in flight, but for what is on the host, and the states of a teacher."""
    recomputed: int
    """What backward computes again at a time: of one block, and of one tile of its MLP."""
    logits: int
    """One chunk of logits, of a teacher too, and the gradients that the loss makes while it has them."""
    buffers: int
    """What is on its way between ranks."""
    host: int
    """In the host's memory: inputs of recomputed blocks that are offloaded."""

    @property
    def total(self) -> int:
        """Sum of all that is in the device's memory."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


def rank_memory(
    config: RunConfig, model: ModelConfig, shape: GridShape, stage: int, dtype: torch.dtype, device: torch.device | None = None
) -> RankMemory:
    """Memory of a rank of a pipeline stage.

    Args:
        config: of the run; its own grid does not matter.
        model: shape of the whole model.
        shape: the grid.
        stage: number of the pipeline stage.
        dtype: of parameters and activations.
        device: of a rank; null: that of this process.
    """
    part = _stage(config, model, shape, stage)
    tp = TensorParallel(Group("tp", tuple(range(shape.tp)), 0, None, Traffic()), config.parallel.sequence_parallel_activations)
    with torch.device("meta"):
        held = GPT(model, tp=tp, stage=part)
    elements = sum(parameter.numel() for parameter in held.parameters())
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    zero = 0 if config.optimizer.sharding == "whole_tensor" else int(config.optimizer.sharding[-1])
    owned = -(-elements // shape.dp)
    tokens = config.planning.tokens_per_pack or config.data.longest_sequence
    kept, recomputed, host = _activations(config, model, shape, part, tokens, dtype)
    in_flight = min(shape.pp - stage, shape.pp)
    chunk = config.train.loss_tile_tokens or chunk_tokens(device or local_device(), model.vocab_size // shape.tp)
    teacher = TeacherMemory()
    if config.distillation is not None:
        teacher = teacher_memory(config.distillation, model, part, tp, (stage, shape.pp), tokens, chunk, dtype)
    return RankMemory(
        parameters=size * (owned if zero == 3 else elements) + weight_codes(config.precision, model, held) + teacher.parameters,
        gradients=wide * (owned if zero >= 2 else elements),
        optimizer=wide * _optimizer_values(config, model, held, shape, aliased=zero == 0 and dtype.itemsize >= 4) // shape.dp,
        activations=(kept + teacher.activations) * in_flight + teacher.stream,
        recomputed=recomputed,
        logits=_logits(model, shape, tokens, dtype, chunk, teacher) if part.is_last else 0,
        buffers=_buffers(model, shape, part, tokens, dtype, teacher) + _exchanged(config, model, shape, tokens, dtype),
        host=host * in_flight,
    )


def _optimizer_values(config: RunConfig, model: ModelConfig, held: GPT, shape: GridShape, aliased: bool) -> int:
    """Masters, moments and anchors of a model line's part; ``aliased``: masters are the parameters, but where they are put together."""
    routes = route(parameter_shapes(model), config.optimizer)
    gathers = shape.tp > 1 and config.optimizer.muon.tp_mode == "gather"
    values, anchors = 0, config.optimizer.meta_experience_replay is not None
    for name, parameter in held.named_parameters():
        own = not aliased or (gathers and routes[name] in ("muon", "normuon"))
        values += parameter.numel() * (MOMENTS[routes[name]] + own + anchors)
    return values


def _stage(config: RunConfig, model: ModelConfig, shape: GridShape, stage: int) -> Stage:
    given = config.parallel.layers_per_stage
    fits = given is not None and len(given) == shape.pp
    layers = given if fits else balanced(model.num_layers, shape.pp, model.block_parameters, *[model.embedding_parameters] * 2)
    return stages(layers)[stage]


class _BlockBytes(NamedTuple):
    """What a block can keep of a pack."""

    stream: int
    """The residual stream, which it reads."""
    products: int
    """Results of matrix products and attention that selective recomputation keeps."""
    everything: int


def _block(config: RunConfig, model: ModelConfig, shape: GridShape, tokens: int, size: int) -> _BlockBytes:
    """Counted in the code of the model: see the tests, which measure. ``size``: bytes of a value."""
    outside = -(-tokens // shape.tp) if config.parallel.sequence_parallel_activations else tokens
    heads, keys = model.num_heads // shape.tp, max(1, model.num_kv_heads // shape.tp)
    queries, keys = heads * model.head_dim, keys * model.head_dim
    channels = model.intermediate_size // shape.tp
    entered = tokens * model.hidden_size * size
    # Attention keeps q, k, v and its output for itself and for the projections around it; a number a query for the softmax.
    attention = tokens * (2 * queries + 2 * keys) * size + tokens * heads * max(4, size)
    attention += 2 * tokens * (queries + keys) * size if model.qk_norm else 0
    products = tokens * (2 * queries + 2 * keys + model.hidden_size) * size
    norms = (4 if model.norm.placement == "peri" else 2) * _norm(model, outside, size)
    # Norms keep their input and give theirs to the projections.
    everything = norms + 2 * entered + attention
    if config.train.mlp_tile_tokens is None:
        # The gate keeps both sides, its activation and the product.
        everything += 4 * tokens * channels * size
        products += tokens * (2 * channels + model.hidden_size) * size
    return _BlockBytes(outside * model.hidden_size * size, products, everything)


def _norm(model: ModelConfig, outside: int, size: int) -> int:
    """What a norm keeps of ``outside`` tokens."""
    twice = {"crms": max(4, size) + size, "power": 2 * size, "unified": 2 * size}
    return outside * model.hidden_size * twice.get(model.norm.kind, size)


def _activations(
    config: RunConfig, model: ModelConfig, shape: GridShape, part: Stage, tokens: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes that autograd keeps of one pack, that backward computes again at a time, and that are kept on the host."""
    size, options, layers = dtype.itemsize, config.train, len(part.layers)
    what, tile = options.activation_checkpointing, options.mlp_tile_tokens
    stream, products, everything = _block(config, model, shape, tokens, size)
    # Where products of tiles cannot be kept, attention and MLP are recomputed apart.
    inputs = layers * {"full": stream, "selective": stream * (1 if tile is None else 2), "none": 0}[what]
    host = inputs * options.offload_activations
    kept = layers * {"full": 0, "selective": products, "none": everything}[what] + inputs - host
    if what == "none":
        channels, queries = model.intermediate_size // shape.tp, model.num_heads // shape.tp * model.head_dim
        codes = {"hidden": tokens * model.hidden_size, "queries": tokens * queries, "channels": tokens * channels}
        kept += stashed(config.precision, model, part.layers, codes, size)
    again = {"full": everything, "selective": everything - products, "none": 0}[what]
    # The next input comes back from the host meanwhile. A tile keeps what a gate keeps.
    again += stream * options.offload_activations + 4 * min(tile or 0, tokens) * model.intermediate_size // shape.tp * size
    outside = stream // model.hidden_size // size
    norm, projection = _norm(model, outside, size), stream * model.embedding_projection
    first = tokens * 8 + projection + norm * model.norm.embedding_norm
    last = norm + stream + projection + tokens * model.hidden_size * size
    angles = 2 * tokens * model.head_dim * size
    return kept + angles + first * part.is_first + last * part.is_last, again, host


def _logits(model: ModelConfig, shape: GridShape, tokens: int, dtype: torch.dtype, chunk: int, teacher: TeacherMemory) -> int:
    rows, size, wide = -(-model.vocab_size // shape.tp), dtype.itemsize, max(4, dtype.itemsize)
    narrow = size if size < wide else 0
    matrix, states = rows * model.hidden_size, tokens * model.hidden_size * size
    alone = min(chunk, tokens) * rows * (wide + 2 * narrow) + matrix * (wide + narrow) + states
    # The divergence from a teacher comes behind the loss, whose gradients wait for backward.
    return max(alone, matrix * size + states + teacher.logits) if teacher.logits else alone


def _buffers(model: ModelConfig, shape: GridShape, part: Stage, tokens: int, dtype: torch.dtype, teacher: TeacherMemory) -> int:
    buckets = 2 * BUCKET_BYTES if shape.dp > 1 else 0
    ends = 2 - part.is_first - part.is_last
    return buckets + 2 * ends * (tokens * model.hidden_size * dtype.itemsize + teacher.stream)


def _exchanged(config: RunConfig, model: ModelConfig, shape: GridShape, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of queries, keys and values on their way between the ranks of a block: as sent, and as received."""
    if config.planning.policy == "data_parallel" or shape.dp == 1:
        return 0
    heads = model.num_heads // shape.tp
    return 2 * tokens * (heads + 2 * heads) * model.head_dim * dtype.itemsize


def grids(config: RunConfig, model: ModelConfig, devices: int) -> Iterator[GridShape]:
    """Every grid of ``devices`` ranks that the model can be divided by, the ones with most data parallelism first."""
    zero = config.optimizer.sharding != "whole_tensor"
    shapes = [
        GridShape(pp, devices // tp // pp, tp)
        for tp in range(1, devices + 1)
        for pp in range(1, devices // tp + 1)
        if devices % (tp * pp) == 0 and not (zero and tp * pp > 1)
    ]
    for shape in sorted(shapes, key=lambda shape: (-shape.dp, shape.pp)):
        try:
            check_divides(model, ParallelOptions(tp=shape.tp, pp=shape.pp))
        except ConfigError:
            continue
        yield shape


def largest_rank(
    config: RunConfig, model: ModelConfig, shape: GridShape, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[int, RankMemory]:
    """The pipeline stage that needs most, and what it needs; see ``rank_memory``."""
    fitted = replace(config.parallel, tp=shape.tp, pp=shape.pp, layers_per_stage=None, sequence_parallel_activations=False)
    keeps = config.parallel.sequence_parallel_activations and shape.tp > 1
    parallel = replace(fitted, sequence_parallel_activations=keeps)
    on_grid = config.model_copy(update={"parallel": parallel})
    memories = [(stage, rank_memory(on_grid, model, shape, stage, dtype, device)) for stage in range(shape.pp)]
    return max(memories, key=lambda each: each[1].total)
