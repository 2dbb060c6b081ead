"""What a run minimizes beside the loss of the next token: whether its parts fit, and whether a resumed run has the same."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.hf import load_hf_config
from megatron_ext.config import RunConfig
from megatron_ext.config.objective_options import DistillationOptions
from megatron_ext.data.loss_weights import SourceWeights
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.parallel_limits import check_divides
from megatron_ext.option_rules import require

HASHED_BYTES = 2**20


def check_objective(config: RunConfig, model: ModelConfig, sources: list[str]) -> None:
    """Raise ConfigError or CheckpointError if a name is not one of ``sources``, or the teacher, whose config.json is read, does not fit."""
    weighting, options = config.loss_weighting, config.distillation
    unknown = [name for name in (weighting.sources if weighting else ()) if name not in sources]
    require((not unknown, "loss_weighting.sources", unknown, ", ".join(sources)))
    if options is None:
        return
    teacher = load_hf_config(options.teacher)
    try:
        depth = config.parallel if teacher.num_layers == model.num_layers else replace(config.parallel, layers_per_stage=None)
        check_divides(teacher, depth)
        longest, most = config.data.longest_sequence, teacher.max_position
        require((most >= longest, "max_position", most, f"at least the {longest} tokens of the longest sequences of the run"))
        _check_fits(options, teacher, model, sources, config.planning.policy != "data_parallel")
    except ConfigError as error:
        raise ConfigError(f"distillation, teacher {options.teacher}: {error}") from error


def _check_fits(options: DistillationOptions, teacher: ModelConfig, model: ModelConfig, sources: list[str], shares: bool) -> None:
    parts = [("kl", options.kl), ("hidden", options.hidden)]
    unknown = [f"{key}.sources {name!r}" for key, part in parts for name in (part and part.sources) or () if name not in sources]
    deepest = max((options.hidden and options.hidden.layers) or [0])
    shape, wanted = (teacher.hidden_size, teacher.num_layers), (model.hidden_size, model.num_layers)
    require(
        (teacher.vocab_size == model.vocab_size, "vocab_size", teacher.vocab_size, f"that of the model, {model.vocab_size}"),
        (options.hidden is None or shape == wanted, "hidden_size and num_layers", shape, f"with hidden those of the model, {wanted}"),
        (deepest <= model.num_layers, "hidden.layers", deepest, f"at most the {model.num_layers} layers of the model"),
        (not unknown, "sources", ", ".join(unknown), ", ".join(sources)),
        (
            not shares or teacher.num_heads >= model.num_heads,
            "num_heads",
            teacher.num_heads,
            f"at least the {model.num_heads} of the model where packs are shared, which divides heads",
        ),
    )


def objective_state(config: RunConfig, weights: SourceWeights | None) -> dict[str, str | None]:
    """What checkpoints say of the teacher and of the weights that sources bring: their hashes; None where there are none."""
    teacher = None if config.distillation is None else _fingerprint(config.distillation.teacher)
    return {"teacher": teacher, "loss_weights": None if weights is None else weights.fingerprint()}


def check_same_objective(saved: Mapping[str, Any] | None, now: Mapping[str, Any], allow_changed: bool) -> None:
    """Raise CheckpointError if a resumed run has another teacher or other weights than it was saved with; ``saved``: None in old ones.

    To begin with a teacher or with weights, or to go on without, is no such change.
    """
    changed = [key for key, value in now.items() if value and (saved or {}).get(key) not in (None, value)]
    if changed and not allow_changed:
        raise CheckpointError(
            f"{' and '.join(changed)} changed since the checkpoint: other files than those that the run was trained with. "
            "Set checkpoint.allow_changed_data=true to continue with the new ones"
        )


def _fingerprint(directory: str) -> str:
    """Hash of config.json, and of the sizes, begins and ends of the files of weights of a checkpoint."""
    digest = hashlib.blake2b(digest_size=16)
    for path in [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()
