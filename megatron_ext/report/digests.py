"""Where two runs part: the first step, what of it, and the first tensor in the order of the model."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.json_text import parse_json
from megatron_ext.report.lines import read_lines

DIGESTS_FILE = "digests.jsonl"
LAST_BITS = 1e-4
"""Relative difference of norms up to which only the order of sums may differ."""

Tensors = Mapping[str, tuple[str, float]]
"""Digest and norm by name, in the order of the model."""


@dataclass(frozen=True)
class StepDigests:
    """One step of a run."""

    step: int
    documents: str
    loss: float
    lr: float
    gradients: Tensors
    parameters: Tensors


@dataclass(frozen=True)
class RunDigests:
    """What a run wrote about itself."""

    directory: Path
    steps: dict[int, StepDigests]
    begins: dict[int, Tensors]
    """The parameters with which the run began, or went on after the step that is the key."""


@dataclass(frozen=True)
class Difference:
    """Where two runs part."""

    step: int
    what: str
    """``begin``, ``documents``, ``loss``, ``gradients``, ``learning rate`` or ``parameters``."""
    tensors: tuple[str, ...]
    """That differ, in the order of the model."""
    seen: tuple[str, str]
    """Of the first of them, or of the value."""
    relative: float
    """Largest relative difference of norms, or of the value; NaN where there is none."""
    compared: int = 0
    """Tensors that were compared."""

    def __str__(self) -> str:
        if not self.tensors:
            amount = "" if math.isnan(self.relative) else f", relative difference {self.relative:.2e}"
            return f"step {self.step}: {self.what} {self.seen[0]} and {self.seen[1]}{amount}"
        what = "parameters before the next step" if self.what == "begin" else self.what
        many = f"; {len(self.tensors)} of {self.compared} tensors differ, norms by at most {self.relative:.2e}"
        return f"step {self.step}: {what}: first {self.tensors[0]} with norm {self.seen[0]} and {self.seen[1]}{many}"


def read_digests(run_dir: str | Path) -> RunDigests:
    """The digests of a run.

    Raises:
        DataError: there are none, or a line is none; names the file and the line.
    """
    path = Path(run_dir) / DIGESTS_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run writes it with logging.digests_every")
    lines, _ = read_lines(path)
    steps: dict[int, StepDigests] = {}
    begins: dict[int, Tensors] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_json(line)
            if values["kind"] == "begin":
                begins[_whole(values["step"])] = _tensors(values["parameters"])
            else:
                steps[_whole(values["step"])] = _step(values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: no digests of a step: {type(error).__name__} {error}; the line is {line[:80]!r}") from None
    return RunDigests(Path(run_dir), steps, begins)


def first_difference(one: RunDigests, other: RunDigests) -> Difference | None:
    """Where the runs part; None if they do not in the steps that both have.

    In a step, what comes first is compared first: documents, loss, gradients, learning rate, parameters; before it the parameters that a
    run went on with, against those that it, or the other run, had then.

    Raises:
        DataError: they have no step in common.
    """
    common = sorted(one.steps.keys() & other.steps.keys())
    if not common:
        raise DataError(f"{one.directory} and {other.directory} have digests of no step in common")
    # A run may have begun anew where the other has digests of no step: then only its own last ones are there to be compared with.
    moments = sorted({*common, *one.begins, *other.begins})
    return next((found for step in moments for found in _differences(one, other, step, step in common)), None)


def cause(difference: Difference, one: RunDigests, other: RunDigests, settings: list[str]) -> str:
    """The usual cause of such a difference. ``settings``: keys whose values differ between the runs."""
    grids = [key for key in settings if key.startswith(("parallel.", "planning."))]
    if difference.what == "begin" and difference.step:
        return "state was not restored at the resume: another checkpoint, or one that was changed"
    if difference.what == "begin":
        return "initial weights differ: seed, model, or model.init_from"
    if difference.what == "documents":
        return "other documents or another order of them: seed, data, or the files of the sources changed"
    if difference.what == "learning rate":
        return "another learning rate: optimizer.lr, schedule, or train.steps"
    if difference.relative <= LAST_BITS and difference.what in ("loss", "gradients"):
        where = f" ({', '.join(grids)})" if grids else ", or other kernels, threads or hardware"
        return f"only last bits differ: sums in another order, as on another grid or plan{where}"
    if difference.what == "loss":
        before = _weights_known_equal(one, other, difference.step)
        return "the forward pass computes otherwise: kernel, recipe, dtype, or loss" if before else "weights differ, or the forward pass"
    if difference.what == "gradients":
        kinds = sorted({re.sub(r"\d+", "*", name) for name in difference.tensors})
        if len(kinds) <= 2 and difference.compared > len(difference.tensors):
            return f"gradients of one kind of layer differ ({', '.join(kinds)}): its kernel or recipe"
        return "backward passes differ: kernel, recipe, dtype, or method"
    if len(difference.tensors) == 1 and difference.compared > 1:
        return "gradients are equal and one parameter is not: its bits were changed in memory, on disk or on the way, or its rule differs"
    return "gradients are equal and updates are not: optimizer, method, or state of the optimizer"


def _differences(one: RunDigests, other: RunDigests, step: int, in_both: bool) -> Iterator[Difference]:
    if in_both:
        first, second = one.steps[step], other.steps[step]
        yield from _values(step, "documents", first.documents, second.documents)
        yield from _values(step, "loss", first.loss, second.loss)
        yield from _tensor_differences(step, "gradients", first.gradients, second.gradients)
        yield from _values(step, "learning rate", first.lr, second.lr)
        yield from _tensor_differences(step, "parameters", first.parameters, second.parameters)
    begins = [run.begins[step] for run in (one, other) if step in run.begins]
    ended = [run.steps[step].parameters for run in (one, other) if step in run.steps]
    for begin in begins:
        for reference in (*ended[:1], *begins):
            yield from _tensor_differences(step, "begin", reference, begin)


def _values(step: int, what: str, first: str | float, second: str | float) -> Iterator[Difference]:
    if first != second and not (first != first and second != second):
        numbers = isinstance(first, float) and isinstance(second, float)
        relative = _relative(first, second) if isinstance(first, float) and isinstance(second, float) else math.nan
        yield Difference(step, what, (), (f"{first:.9g}", f"{second:.9g}") if numbers else (str(first), str(second)), relative)


def _tensor_differences(step: int, what: str, first: Tensors, second: Tensors) -> Iterator[Difference]:
    names = tuple(name for name in {**first, **second} if first.get(name, ("",))[0] != second.get(name, ("",))[0])
    if names:
        norms = {name: (first.get(name, ("", math.nan))[1], second.get(name, ("", math.nan))[1]) for name in names}
        relative = max(_relative(*pair) for pair in norms.values())
        seen = norms[names[0]]
        yield Difference(step, what, names, (f"{seen[0]:.9g}", f"{seen[1]:.9g}"), relative, len({**first, **second}))


def _relative(first: float, second: float) -> float:
    """Difference as a share of the larger; infinite if one is no number."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second), 1e-300)


def _weights_known_equal(one: RunDigests, other: RunDigests, step: int) -> bool:
    """Both runs say what the parameters were just before ``step``, and it is the same: no difference was found there."""
    before = step - 1
    return all(before in run.steps or before in run.begins for run in (one, other))


def _step(values: Mapping[str, Any]) -> StepDigests:
    if values["kind"] != "digests" or not isinstance(values["documents"], str):
        raise ValueError("kind must be begin or digests, documents text")
    loss, lr = _number(values["loss"]), _number(values["lr"])
    return StepDigests(_whole(values["step"]), values["documents"], loss, lr, _tensors(values["gradients"]), _tensors(values["parameters"]))


def _tensors(values: Any) -> dict[str, tuple[str, float]]:
    if not isinstance(values, dict):
        raise ValueError("tensors must be an object")
    return {name: (_text(digest), _number(norm)) for name, (digest, norm) in values.items()}


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a step must be a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e308:
        if isinstance(value, float):
            return value
        raise ValueError("a number is needed")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a digest must be text")
    return value
