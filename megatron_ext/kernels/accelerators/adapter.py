"""What the adapters to optional packages have in common: what they report, and how a package is checked before anything of it is called."""

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class Accelerator:
    """An optional package as it is on this machine. Nothing of it runs unless an option asks for it."""

    name: str
    written_against: str
    """Versions whose documentation and sources the adapter follows."""
    version: str | None
    """What is installed; None: nothing."""
    services: Mapping[str, str | None]
    """What it may be asked for, and for each the reason why it cannot serve on this machine; None: it can."""


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def present(module: str) -> bool:
    """Whether a top-level module could be imported, without doing so."""
    return importlib.util.find_spec(module) is not None


def gpu_obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why ``device`` is not a GPU of ``capability`` or more, or None if it is."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs a GPU of compute capability {capability[0]}.{capability[1]} or newer"
    return None


def imported(module: str) -> ModuleType | str:
    """``module``, or why it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        # Not only ImportError: packages built for another PyTorch or another GPU fail in their own ways.
        return f"cannot be imported ({type(error).__name__}: {error})"


def signature_obstacle(module: ModuleType, calls: Mapping[str, tuple[str, ...]], written_against: str) -> str | None:
    """Why ``module`` is not what an adapter calls, or None if it is.

    Args:
        module: has the functions and classes.
        calls: names of functions and classes, and for each the keywords of the call that the adapter makes.
        written_against: versions that have all of them.
    """
    for name, keywords in calls.items():
        difference = _difference(getattr(module, name, None), keywords)
        if difference:
            return f"differs from {written_against}, for which this adapter is written: {module.__name__}.{name} {difference}"
    return None


def _difference(function: Callable[..., object] | None, keywords: tuple[str, ...]) -> str | None:
    if function is None:
        return "is not there"
    try:
        inspect.signature(function).bind(**dict.fromkeys(keywords))
    except ValueError:
        return "does not tell its arguments"
    except TypeError as error:
        return f"is called with {', '.join(keywords)}: {error}"
    return None
