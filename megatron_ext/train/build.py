"""From a configuration to the parts of a run: model, optimizer, data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights
from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.config import RunConfig, total_steps
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.tokenizer import Tokenizer, copy_tokenizer_files, load_tokenizer
from megatron_ext.data.validation import ValidationSet, validation_sets
from megatron_ext.errors import ConfigError
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.device import choose_dtype
from megatron_ext.parallel.world import World
from megatron_ext.train.sources import build_mixture


@dataclass(frozen=True)
class Setup:
    """What a run is made of before any rank has spoken to another."""

    config: RunConfig
    model: ModelConfig
    tokenizer_dir: Path | None
    tokenizer: Tokenizer | None
    mixture: Mixture
    validation: list[ValidationSet]

    @property
    def tokens_per_pack(self) -> int:
        """Most tokens that one rank computes at once."""
        return self.config.planning.tokens_per_pack or self.config.data.sequence_length

    @property
    def token_budget(self) -> int:
        """Most tokens that the run trains on."""
        return total_steps(self.config) * self.config.data.tokens_per_step

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
    model = _model_config(config, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"model.vocab_size is {model.vocab_size}; the tokenizer in {tokenizer_dir} has {tokenizer.vocab_size} tokens")
    mixture = build_mixture(config)
    validation = validation_sets(config.data, mixture.corpora, config.evaluation.tokens)
    setup = Setup(config, model, Path(tokenizer_dir) if tokenizer_dir else None, tokenizer, mixture, validation)
    mixture.check_epochs(setup.token_budget)
    return setup


def _model_config(config: RunConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    if config.model.init_from is None:
        vocab_size = tokenizer.vocab_size if tokenizer else config.model.vocab_size
        assert vocab_size is not None, "the configuration has a tokenizer or a vocabulary size"
        return ModelConfig.from_options(config.model, vocab_size, config.data.sequence_length)
    return load_hf_config(config.model.init_from)


def build_model(setup: Setup, world: World) -> tuple[GPT, dict[str, str]]:
    """The model on this rank's device with its first weights, and what was chosen for it and why, for the banner."""
    config = setup.config
    dtype, why_dtype = choose_dtype(config.train.dtype, world.device)
    attention, why_attention = select_backend(config.model.attention, world.device, dtype, setup.model.head_dim)
    with torch.device("meta"):
        model = GPT(setup.model, attention, config.train.activation_checkpointing)
    model.to_empty(device=world.device)
    if config.model.init_from:
        load_hf_weights(model, config.model.init_from)
        origin = config.model.init_from
    else:
        model.reset_parameters(config.seed)
        origin = f"random, seed {config.seed}"
    chosen = {
        "weights": origin,
        "dtype": f"{str(dtype).removeprefix('torch.')} ({why_dtype})",
        "attention": f"{attention} ({why_attention})",
    }
    return model.to(dtype), chosen


def build_optimizer(model: torch.nn.Module, options: OptimizerOptions, world: World) -> ShardedOptimizer:
    """AdamW on float32 master rows, each data rank owning its part."""

    def rule(owned: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        return AdamW(decay_groups(owned, options.weight_decay), lr=options.lr, betas=tuple(options.betas), eps=options.eps)

    return ShardedOptimizer(model.named_parameters(), rule, world, options.clip_norm)
