"""From a configuration to the parts of a run: model, optimizer, data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.hf import load_hf_weights, read_hf_tensors
from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.config import RunConfig, deepspeed_config, total_steps
from megatron_ext.data.loss_weights import SourceWeights, source_weights
from megatron_ext.data.needle import Haystack
from megatron_ext.data.sampler import Sampler
from megatron_ext.data.tokenizer import Tokenizer, copy_tokenizer_files, load_tokenizer
from megatron_ext.data.validation import ValidationSet, validation_sets
from megatron_ext.errors import ConfigError
from megatron_ext.kernels.chunk_attention import select_backend as select_chunk_backend
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.init import initialize_parameter
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.mlp import set_tile
from megatron_ext.model.norm_kinds import set_backend as set_norm_backend
from megatron_ext.model.parallel_limits import check_divides
from megatron_ext.model.placements import placements
from megatron_ext.model.precision import linear_recipes
from megatron_ext.optim.extension import Constraint
from megatron_ext.optim.options import OptimizerOptions, RuleName
from megatron_ext.optim.qk_clip import QKClip
from megatron_ext.optim.routing import route
from megatron_ext.optim.rules import build_rules
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.device import HostTransfer, choose_dtype
from megatron_ext.parallel.grid import Grid, GridShape, grid_shape
from megatron_ext.parallel.pipeline import balanced, stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.precision.recipe import Recipe
from megatron_ext.train.distillation import Distillation
from megatron_ext.train.engine import Engine, owner_engine, zero_engine
from megatron_ext.train.layer_times import measure_layers
from megatron_ext.train.logit_clip import LogitClip
from megatron_ext.train.methods import update_extensions
from megatron_ext.train.needle_evaluation import build_haystack
from megatron_ext.train.objective import check_objective
from megatron_ext.train.positions import checkpoint_model, describe_positions
from megatron_ext.train.precision import apply_recipe
from megatron_ext.train.running_norms import RunningNormUpdate
from megatron_ext.train.sources import build_mixture
from megatron_ext.train.zero import partitioned, set_weights


@dataclass(frozen=True)
class Setup:
    """What a run is made of before any rank has spoken to another."""

    config: RunConfig
    model: ModelConfig
    tokenizer_dir: Path | None
    tokenizer: Tokenizer | None
    mixture: Sampler
    validation: list[ValidationSet]
    routes: dict[str, RuleName]
    """The update rule of every parameter."""
    loss_weights: SourceWeights | None = None
    """Of the losses, as sources bring them; None: 1."""
    haystack: Haystack | None = None
    """Text to hide needles in, where the run asks for needles."""

    @property
    def tokens_per_pack(self) -> int:
        """Most tokens that one rank computes at once."""
        return self.config.planning.tokens_per_pack or self.config.data.longest_sequence

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return total_steps(self.config)

    @property
    def token_budget(self) -> int:
        """Most tokens that the run trains on."""
        return self.total_steps * self.config.data.tokens_per_step

    def hf_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of the exported model."""
        eod = self.tokenizer.eod_id if self.tokenizer else None
        return config_to_hf(self.model, dtype=str(dtype).removeprefix("torch."), eos_token_id=eod)

    @property
    def copy_tokenizer(self) -> Callable[[Path], None]:
        """Puts the tokenizer's files into a checkpoint directory."""
        source = self.tokenizer_dir
        return (lambda directory: None) if source is None else (lambda directory: copy_tokenizer_files(source, directory))


def prepare(config: RunConfig) -> Setup:
    """Read and check everything that needs no process group: model shape, tokenizer, data.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be used, with its key or file.
    """
    tokenizer_dir = config.tokenizer or config.model.init_from
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    model = model_config(config, tokenizer.vocab_size if tokenizer else None)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"model.vocab_size is {model.vocab_size}; the tokenizer in {tokenizer_dir} has {tokenizer.vocab_size} tokens")
    mixture = build_mixture(config)
    validation = validation_sets(config.data, mixture.corpora, config.evaluation.tokens)
    check_divides(model, config.parallel)
    if config.optimizer.qk_clip is not None and model.qk_norm:
        raise ConfigError(f"optimizer.qk_clip is {config.optimizer.qk_clip}; accepted is null with model.qk_norm, which bounds the logits")
    linear_recipes(model, Recipe(config.precision))
    routes = route(parameter_shapes(model), config.optimizer)
    check_objective(config, model, [corpus.name for corpus in mixture.corpora])
    directory = Path(tokenizer_dir) if tokenizer_dir else None
    weights, haystack = source_weights(mixture.corpora), build_haystack(config.evaluation.needle, validation)
    setup = Setup(config, model, directory, tokenizer, mixture, validation, routes, weights, haystack)
    mixture.check_epochs(setup.token_budget)
    return setup


def model_config(config: RunConfig, vocab_size: int | None) -> ModelConfig:
    """The model that a configuration describes; ``vocab_size`` is that of the tokenizer, None without one."""
    if config.model.init_from is None:
        vocab_size = vocab_size or config.model.vocab_size
        assert vocab_size is not None, "the configuration has a tokenizer or a vocabulary size"
        return ModelConfig.from_options(config.model, vocab_size, config.data.longest_sequence)
    return checkpoint_model(config.model, config.data.longest_sequence)


def run_shape(config: RunConfig, model: ModelConfig, world_size: int) -> GridShape:
    """Shape of the grid of ``world_size`` ranks.

    Raises:
        ConfigError: if the ranks cannot be divided, or packs not be shared, as the configuration says.
    """
    shape = grid_shape(config.parallel, world_size)
    degree, heads = config.planning.degree, model.num_heads // shape.tp
    most = min(shape.dp, config.planning.largest_degree or heads)
    accepted = [1 << power for power in range(most.bit_length())]
    if degree is not None and degree not in accepted:
        numbers = ", ".join(map(str, accepted))
        raise ConfigError(f"planning.degree is {degree}; accepted with {shape.dp} data ranks and {heads} query heads on each: {numbers}")
    largest = 1 if config.planning.policy == "data_parallel" else degree or accepted[-1]
    if config.model.evaluation_window is not None and largest > heads:
        raise ConfigError(
            f"model.evaluation_window is set with blocks of up to {largest} ranks; accepted are planning.degree and "
            f"planning.largest_degree of at most {heads}, the query heads of a rank: around a ring no rank has whole documents"
        )
    return shape


def build_grid(setup: Setup, world: World) -> Grid:
    """The grid of a run's ranks.

    Raises:
        ConfigError: before any group exists, if the ranks cannot be divided as the configuration says.
    """
    shape = run_shape(setup.config, setup.model, world.size)
    return Grid(world, shape, kv_copies=max(1, shape.tp // setup.model.num_kv_heads))


def build_model(setup: Setup, grid: Grid, resumes: bool = False) -> tuple[GPT, dict[str, str]]:
    """This rank's part of the model on its device with its first weights, and what was chosen for it and why, for the banner.

    ``resumes``: a checkpoint's weights take their place, so that ``model.init_from`` is not compared with its saved hashes.
    """
    config, device = setup.config, grid.world.device
    dtype, why_dtype = choose_dtype(config.train.dtype, device)
    attention, why_attention = select_backend(config.model.attention, device, dtype, setup.model.head_dim)
    layers, why_layers = layers_per_stage(setup, grid)
    tp = TensorParallel(grid.tp, config.parallel.sequence_parallel_activations)
    max_logits = None if config.optimizer.qk_clip is None else MaxLogits(setup.model, device)
    if config.model.init_from and not resumes:
        check_undamaged(Path(config.model.init_from), grid.world)

    def make() -> GPT:
        return GPT(setup.model, attention, config.train.activation_checkpointing, tp, stages(layers)[grid.stage], max_logits)

    if config.optimizer.sharding == "zero3":
        model = partitioned(make, grid, dtype)
        set_weights(model, grid.world.activity.each(_first_weights(setup)))
    else:
        with torch.device("meta"):
            model = make()
        model.to_empty(device=device)
        _fill(model, setup, grid.world.activity.move)
        model = model.to(dtype)
    set_tile(model, config.train.mlp_tile_tokens)
    model.loss_tile = config.train.loss_tile_tokens
    model.offload = HostTransfer(device) if config.train.offload_activations else None
    chosen = {
        "weights": config.model.init_from or f"random, seed {config.seed}",
        **describe_positions(config.model, setup.model),
        "dtype": f"{str(dtype).removeprefix('torch.')} ({why_dtype})",
        "attention": f"{attention} ({why_attention})",
        **({"evaluation": str(config.model.evaluation_window)} if config.model.evaluation_window else {}),
        "norms": set_norm_backend(model, config.model.norm_backend, device, dtype),
        **_ring_attention(setup, grid, dtype),
        **apply_recipe(model, config, grid),
        **({"blocks per stage": f"{layers} ({why_layers})"} if grid.shape.pp > 1 else {}),
    }
    return model, chosen


def _ring_attention(setup: Setup, grid: Grid, dtype: torch.dtype) -> dict[str, str]:
    """What computes attention around rings, where a block may have more ranks than heads. Raises ConfigError if nothing can."""
    largest = min(setup.config.planning.largest_degree or 1, grid.shape.dp)
    if setup.config.planning.policy == "data_parallel" or largest <= setup.model.num_heads // grid.shape.tp:
        return {}
    backend = select_chunk_backend("auto", grid.world.device, dtype, setup.model.head_dim)
    return {"ring attention": f"{backend} (auto: that of the device, whatever model.attention is)"}


def _fill(model: GPT, setup: Setup, moved: Callable[[], None]) -> None:
    """Give a model its first weights; ``moved`` is called after each that is read."""
    if setup.config.model.init_from:
        load_hf_weights(model, setup.config.model.init_from, moved)
    else:
        model.reset_parameters(setup.config.seed)


def _first_weights(setup: Setup) -> Iterator[tuple[str, torch.Tensor]]:
    """As ``_fill``, whole tensors one at a time."""
    if setup.config.model.init_from:
        yield from read_hf_tensors(setup.config.model.init_from, setup.model)
        return
    for name, shape in parameter_shapes(setup.model).items():
        whole = torch.empty(shape)
        initialize_parameter(name, whole, setup.model, setup.config.seed)
        yield name, whole


def layers_per_stage(setup: Setup, grid: Grid) -> tuple[list[int], str]:
    """Number of blocks of each pipeline stage, and why."""
    options, model = setup.config.parallel, setup.model
    if options.layers_per_stage is not None:
        return options.layers_per_stage, "parallel.layers_per_stage"
    if options.partition == "time":
        times = measure_layers(model, setup.tokens_per_pack, grid.world)
        return balanced(model.num_layers, options.pp, times.block, times.embedding, times.head), f"balanced by measured time: {times}"
    embedding = model.embedding_parameters
    return balanced(model.num_layers, options.pp, model.block_parameters, embedding, embedding), "balanced by parameters"


def build_engine(setup: Setup, model: GPT, grid: Grid, distillation: Distillation | None = None) -> Engine:
    """The engine with the optimizer that the configuration asks for, which tells ``distillation`` of every pack."""
    options, sources = setup.config.optimizer, len(setup.mixture.corpora)
    settings = deepspeed_config(setup.config, grid.shape.dp)
    shares = setup.config.planning.policy != "data_parallel"
    if options.sharding == "whole_tensor":
        optimizer = build_optimizer(model, options, grid, shares, setup.config.seed)
        return owner_engine(model, optimizer, grid, settings, sources, distillation)
    return zero_engine(model, options, grid, settings, sources, distillation)


def build_optimizer(model: GPT, options: OptimizerOptions, grid: Grid, shares_packs: bool = False, seed: int = 0) -> ShardedOptimizer:
    """The rules and methods that ``options`` ask for on float32 masters, each rank owning its part.

    ``shares_packs``: some packs may be of several data ranks; ``seed``: of what methods draw.
    """
    # A rank in its last pack may share it with one that has another pack to come. On a GPU the reduction that the first begins would
    # wait there for that pack, and the exchange that the second waits for could wait behind it.
    overlap = options.overlap_reduction and not (shares_packs and grid.world.device.type == "cuda")
    where = placements(model, grid, model.config.tie_embeddings)
    rules = build_rules(options, where, grid.tp, model.config.head_dim)
    routes = route(parameter_shapes(model.config), options)
    return ShardedOptimizer(
        dict(model.named_parameters()),
        where,
        {name: rules[routes[name]] for name in where},
        grid,
        options.clip_norm,
        overlap,
        update_extensions(model, options, grid, seed),
        constraint=_constraint(model, options, grid),
    )


def _constraint(model: GPT, options: OptimizerOptions, grid: Grid) -> Constraint | None:
    """What changes parameters after the update."""
    clip = _logit_clip(model, options, grid)
    return RunningNormUpdate(model, grid, clip) if model.config.norm.keeps_statistics else clip


def _logit_clip(model: GPT, options: OptimizerOptions, grid: Grid) -> LogitClip | None:
    if options.qk_clip is None:
        return None
    assert model.max_logits is not None, "the model was built for these options"
    shape = model.config
    clip = QKClip(options.qk_clip, options.qk_clip_alpha, shape.head_dim, shape.num_heads, shape.num_kv_heads)
    return LogitClip(clip, model.max_logits, grid.world)
