"""Weights in Hugging Face directories: config.json and safetensors, one file or many. Pickled weights are never read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.contained import is_contained
from megatron_ext.checkpoint.hf_config import config_from_hf, config_to_hf
from megatron_ext.checkpoint.tensor_file import write_tensors
from megatron_ext.errors import CheckpointError
from megatron_ext.json_text import parse_json
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.placements import parameter_boxes
from megatron_ext.parallel.placement import slices, whole_box

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""A table that old Llama checkpoints carry and every reader recomputes."""


def read_hf_json(directory: str | Path, name: str = "config.json") -> dict[str, Any]:
    """An object from a JSON file of ``directory``. Raises CheckpointError if it is missing or no JSON object."""
    path = Path(directory) / name
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a Hugging Face model directory is needed") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def load_hf_config(directory: str | Path) -> ModelConfig:
    """The model that ``directory``/config.json describes; raises CheckpointError as ``config_from_hf`` does."""
    return config_from_hf(read_hf_json(directory))


def load_hf_weights(model: GPT, directory: str | Path, moved: Callable[[], None] = lambda: None) -> None:
    """Copy the weights of a Hugging Face directory into ``model`` (not on the meta device), cast to its dtype, a tensor at a time.

    Of a model that holds only a part, only that part is read. Everything is checked before the first value changes: raises
    CheckpointError naming the tensor or file for anything missing, unexpected, of another shape or not floating-point, and for pickled
    weights. ``moved`` is called after each tensor.
    """
    files, boxes = _checked_files(directory, model.config), parameter_boxes(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape, box = boxes[name]
            with safe_open(files[name], framework="pt") as file:
                parameter.copy_(file.get_slice(name)[slices(box, whole_box(shape))])
            moved()


def read_hf_tensors(directory: str | Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter of ``config``, in the order of the model, read one at a time; errors as ``load_hf_weights``."""
    return in_order(hf_tensor_reader(directory, config), config)


def in_order(read: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter of ``config``, in the order of the model, as ``read`` gives them one at a time."""
    return ((name, read(name)) for name in parameter_shapes(config))


def hf_tensor_reader(directory: str | Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """Reads a parameter of ``config`` by its name, in any order; errors as ``load_hf_weights``."""
    files = _checked_files(directory, config)
    opened = {path: safe_open(path, framework="pt") for path in set(files.values())}
    return lambda name: opened[files[name]].get_tensor(name)


def _checked_files(directory: str | Path, config: ModelConfig) -> dict[str, Path]:
    """The file of each parameter of ``config``; errors as ``load_hf_weights``."""
    files = _locate(Path(directory), tied=config.tie_embeddings)
    _check(Path(directory), files, parameter_shapes(config))
    return files


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    directory: str | Path,
    max_shard_bytes: int,
    *,
    dtype: torch.dtype,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> None:
    """Write ``tensors`` as ``dtype`` into ``directory`` (made if needed), so that transformers loads it as it lies where a family has it.

    Names and shapes must be those of the model; given in its order, only one file's tensors are in memory at a time. Each file appears
    whole or not at all and config.json last; a caller that wants the same of the directory writes it beside and renames. Raises
    CheckpointError for a wrong set of tensors.
    """
    directory = Path(directory)
    hf = config_to_hf(config, dtype=str(dtype).removeprefix("torch."), bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    shapes = parameter_shapes(config)
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    plan = shard_plan(sizes, max_shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(tensors, shapes, plan, directory, dtype)
    if len(plan) > 1:
        write_json(directory / INDEX, shard_index(plan, sizes))
    write_json(directory / "config.json", hf)


def shard_plan(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Divide tensors of ``sizes`` bytes, in order, into files of at most ``max_bytes``; a larger tensor gets a file of its own."""
    plan: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not plan or size > room:
            plan.append([])
            room = max_bytes
        plan[-1].append(name)
        room -= size
    return plan


def shard_file_names(shards: int) -> list[str]:
    """Names of the weight files of a model divided into ``shards``."""
    if shards == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]


def shard_index(plan: list[list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Contents of the index file that says which file holds which tensor."""
    names = shard_file_names(len(plan))
    weight_map = {tensor: file for file, tensors in zip(names, plan, strict=True) for tensor in tensors}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    plan: list[list[str]],
    directory: Path,
    dtype: torch.dtype,
) -> None:
    files = shard_file_names(len(plan))
    shard_of = {name: number for number, names in enumerate(plan) for name in names}
    missing = set(shapes)
    waiting: list[dict[str, Tensor]] = [{} for _ in plan]
    for name, tensor in tensors:
        if name not in missing:
            raise CheckpointError(f"tensor {name} is not part of this model, or was given twice")
        if tensor.shape != shapes[name]:
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}; the model has {list(shapes[name])}")
        missing.remove(name)
        number = shard_of[name]
        waiting[number][name] = tensor.detach().to("cpu", dtype).contiguous()
        if len(waiting[number]) == len(plan[number]):
            write_tensors(directory / files[number], waiting[number])
            waiting[number].clear()
    if missing:
        raise CheckpointError(f"tensors are missing: {_some(missing)}")


def _locate(directory: Path, tied: bool) -> dict[str, Path]:
    """The file of each tensor of a directory."""
    if (directory / INDEX).exists():
        files = _read_index(directory)
    elif (directory / WEIGHTS).exists():
        files = dict.fromkeys(_header(directory / WEIGHTS), directory / WEIGHTS)
    elif pickled := sorted(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{pickled[0]} is a pickle, which can run code when read; load the model once with transformers where you trust it and "
            "store it with save_pretrained, which writes safetensors"
        )
    else:
        raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    if tied and "lm_head.weight" in files:
        _check_tied_head(files)
        del files["lm_head.weight"]
    return {name: path for name, path in files.items() if not name.endswith(IGNORED_SUFFIX)}


def _read_index(directory: Path) -> dict[str, Path]:
    weight_map = read_hf_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / INDEX} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{directory / INDEX} names {file!r}; only .safetensors files of the same directory are accepted")
    present = {file: _header(directory / file) for file in set(weight_map.values())}
    for name, file in weight_map.items():
        if name not in present[file]:
            raise CheckpointError(f"{directory / INDEX} places {name} in {file}, which does not have it")
    return {name: directory / file for name, file in weight_map.items()}


def _header(path: Path) -> set[str]:
    """Names of the tensors of a file."""
    if not is_contained(path.parent, path.name):
        raise CheckpointError(f"{path} is a link that leads out of its directory; accepted are files of the same directory")
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def _check(directory: Path, files: Mapping[str, Path], shapes: Mapping[str, torch.Size]) -> None:
    """Compare names, shapes and kinds of dtype with the model's, from the headers alone."""
    if missing := shapes.keys() - files.keys():
        raise CheckpointError(f"{directory}: tensors are missing: {_some(missing)}")
    if unexpected := files.keys() - shapes.keys():
        raise CheckpointError(f"{directory}: tensors that the model does not have: {_some(unexpected)}")
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name in files if files[name] == path):
                view = file.get_slice(name)
                if view.get_shape() != list(shapes[name]):
                    raise CheckpointError(f"{path}: {name} has shape {view.get_shape()}; config.json asks for {list(shapes[name])}")
                if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise CheckpointError(f"{path}: {name} has dtype {view.get_dtype()}; F64, F32, F16 and BF16 are accepted")


def _check_tied_head(files: Mapping[str, Path]) -> None:
    """A tied model may carry its head as a copy of the embedding, but not as anything else."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if names[0] not in files:
        return
    embedding, head = (safe_open(files[name], framework="pt").get_tensor(name) for name in names)
    if not torch.equal(embedding, head):
        raise CheckpointError(f"{files[names[1]]}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight")


def _some(names: Iterable[str], shown: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
