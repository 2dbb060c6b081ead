"""What a run would be, and what it would need: told without starting it, and before all of its files are there."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_ext.config import RunConfig, summary
from megatron_ext.config.files import files_of
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.parallel.device import choose_dtype, estimated_device
from megatron_ext.parallel.grid import GridShape
from megatron_ext.parallel.world import launched_ranks
from megatron_ext.train.banner import describe_stages
from megatron_ext.train.build import Setup, model_config, prepare, run_shape
from megatron_ext.train.memory import largest_rank

GIB = 2**30


def dry_run(config: RunConfig, ranks: int | None = None, gib: float | None = None, device: str | None = None) -> str:
    """The resolved configuration, the token budget, the layout, the memory of a rank, and the sources.

    Where corpora, weights or a tokenizer are not there yet, it names them instead of what follows from them.

    Args:
        config: of the run.
        ranks: to lay the run out for; None: those that the launcher started.
        gib: memory of a device in GiB; None: nothing is said about whether the run fits.
        device: ``cpu`` or ``cuda``, to lay the run out for; None: a GPU if ``gib`` is given, else that of this machine.

    Raises:
        ConfigError, DataError, CheckpointError: what is there cannot be used, or ranks cannot be divided as the configuration says.
    """
    missing = list(_missing(config))
    setup = None if missing else prepare(config)
    model = _shape_alone(config, missing) if setup is None else setup.model
    shape = run_shape(config, model, ranks or launched_ranks()[1])
    text = summary(config, str(shape), model.num_parameters()) + _memory(config, model, shape, gib, estimated_device(device, gib))
    return text + ("not there yet\n" + "\n".join(f"  {line}" for line in missing) if setup is None else _sources(setup))


def _missing(config: RunConfig) -> Iterator[str]:
    absent: dict[str, list[Path]] = {}
    for key, path in files_of(config):
        if not path.exists():
            absent.setdefault(key, []).append(path)
    yield from (f"{key}: {', '.join(map(str, paths))}" for key, paths in absent.items())
    weights = Path(config.model.init_from) if config.model.init_from else None
    if weights is not None and weights.is_dir() and not any(weights.glob("*.safetensors")):
        yield f"model.init_from: {weights}/*.safetensors"
    if weights is not None and weights.is_dir() and config.tokenizer is None and not any(weights.glob("tokenizer*")):
        yield f"tokenizer: {weights}/tokenizer.json"


def _shape_alone(config: RunConfig, missing: list[str]) -> ModelConfig:
    """The shape of the model, from as little as that takes."""
    if config.model.init_from is not None and not (Path(config.model.init_from) / "config.json").is_file():
        raise ConfigError(
            f"model.init_from: {config.model.init_from}/config.json is not there, so that the shape of the model is not known"
        )
    if config.model.init_from is not None or config.model.vocab_size is not None:
        return model_config(config, None)
    tokenizer = config.tokenizer
    if tokenizer is None or not Path(tokenizer).exists():
        raise ConfigError(f"tokenizer: {tokenizer} is not there and model.vocab_size is null, so the shape of the model is unknown")
    return model_config(config, load_tokenizer(tokenizer).vocab_size)


def _memory(config: RunConfig, model: ModelConfig, shape: GridShape, gib: float | None, device: torch.device) -> str:
    dtype, _ = choose_dtype(config.train.dtype, device)
    stage, memory = largest_rank(config, model, shape, dtype, device)
    parts = ", ".join(f"{name} {value / GIB:.3g}" for name, value in asdict(memory).items())
    line = f"memory           about {memory.total / GIB:.3g} GiB of tensors on a rank of stage {stage}, {device.type} ({parts})"
    if gib is not None:
        line += f": {'fits into' if memory.total <= gib * GIB else 'MORE THAN'} {gib:g} GiB"
    return line + "\n"


def _sources(setup: Setup) -> str:
    budget, rows = setup.token_budget, []
    for corpus, expected in zip(setup.mixture.corpora, setup.mixture.expected_tokens(budget), strict=True):
        epochs = expected / corpus.training_tokens
        rows.append(f"  {corpus.name}: {expected / budget:.1%} of the tokens, {corpus.num_tokens:,} in the corpus, {epochs:.2f} epochs")
    text = "sources\n" + "\n".join(rows)
    if len(setup.mixture.stages) > 1:
        text += "\nstages\n" + "\n".join(f"  {line}" for line in describe_stages(setup))
    return text
