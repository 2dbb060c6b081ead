"""What ``optimizer/index.json`` may say, checked before anything is read by it."""

from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.checkpoint.contained import is_contained
from megatron_ext.errors import CheckpointError
from megatron_ext.option_rules import shown

LARGEST = 2**48
"""Elements along a dimension."""


def checked_parameters(index: Any, accepted_format: int, directory: Path, path: Path) -> dict[str, dict[str, Any]]:
    """The parameters of the index ``path`` of the checkpoint ``directory``: shape and parts of each, by name.

    Raises:
        CheckpointError: another format, a value of another kind, a box outside its parameter, or a file outside the checkpoint.
    """
    found = index.get("format") if isinstance(index, dict) else index
    if not isinstance(index, dict) or type(found) is not int or found != accepted_format:
        raise CheckpointError(f"{path}: format is {shown(found)}; this version reads {accepted_format}")
    parameters = index.get("parameters")
    if not isinstance(parameters, dict):
        _refuse(path, "parameters", parameters, "an object")
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict) or not _sizes(parameter.get("shape")) or not isinstance(parameter.get("parts"), list):
            _refuse(path, name, parameter, "an object with shape, a list of sizes, and parts, a list")
        for number, part in enumerate(parameter["parts"]):
            _check_part(part, parameter["shape"], directory, path, f"{name}, part {number}")
    return parameters


def _check_part(part: Any, shape: list[int], directory: Path, path: Path, where: str) -> None:
    if not isinstance(part, dict) or {"box", "file", "kinds", "scalars"} - part.keys():
        _refuse(path, where, part, "an object with box, file, kinds and scalars")
    box, kinds, scalars = part["box"], part["kinds"], part["scalars"]
    inside = isinstance(box, list) and len(box) == len(shape) and all(map(_is_range, box, shape))
    if not inside:
        _refuse(path, f"{where}: box", box, f"[start, stop] for each dimension of {shape}")
    if not is_contained(directory, part["file"]) or not part["file"].endswith(".safetensors"):
        _refuse(path, f"{where}: file", part["file"], "a .safetensors file of this checkpoint")
    if not isinstance(kinds, dict) or not all(type(each) is int and 0 <= each <= len(shape) for each in kinds.values()):
        _refuse(path, f"{where}: kinds", kinds, f"an object of numbers of dimensions, at most {len(shape)}")
    if "master" not in kinds or kinds["master"] != len(shape):
        _refuse(path, f"{where}: kinds", kinds, f"master with {len(shape)} dimensions")
    if not isinstance(scalars, dict) or not all(type(each) in (int, float) and abs(each) <= LARGEST for each in scalars.values()):
        _refuse(path, f"{where}: scalars", scalars, "an object of numbers")


def _sizes(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(each) is int and 0 < each <= LARGEST for each in shape)


def _is_range(bounds: Any, size: int) -> bool:
    is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(type(each) is int for each in bounds)
    return is_pair and 0 <= bounds[0] < bounds[1] <= size


def _refuse(path: Path, where: str, seen: object, accepted: str) -> NoReturn:
    raise CheckpointError(f"{path}: {where}: {shown(seen)}; accepted: {accepted}")
