"""What goes wrong on one rank goes wrong on all: failures travel as JSON to every rank before anyone raises."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.errors import CheckpointError, NonFiniteError, StorageError
from megatron_ext.parallel.world import World

_ERRORS = {error.__name__: error for error in (CheckpointError, StorageError, NonFiniteError)}


@dataclass(frozen=True)
class Attempt:
    """How an action ended on one rank. All members are JSON values."""

    result: Any
    error: str | None
    """Name of the class of errors that it ended by."""
    message: str | None
    errno: int | None
    """Of an error of the operating system."""
    seconds: float


def attempt(action: Callable[[], Any], what: str = "save the checkpoint") -> Attempt:
    """Run ``action`` and note its result, or how it failed; ``what`` it does is for the message."""
    begin = time.perf_counter()
    result, kind, message, number = None, None, None, None
    try:
        result = action()
    except CheckpointError as error:
        kind, message = type(error).__name__, f"cannot {what}: {error}"
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        kind = (StorageError if isinstance(error, OSError) else CheckpointError).__name__
        message = f"cannot {what}: {type(error).__name__}: {error}"
    return Attempt(result, kind, message, number, time.perf_counter() - begin)


def failure(attempts: dict[str, Attempt]) -> CheckpointError | None:
    """The error that all ranks raise for ``attempts`` by who made them; None if all were good.

    If several failed by different errors it is a ``StorageError`` only if no other kind is among them, and not finite weights come first.
    """
    failed = {who: each for who, each in attempts.items() if each.error is not None}
    if not failed:
        return None
    kinds = {each.error for each in failed.values()}
    kind = next(name for name in ("NonFiniteError", "CheckpointError", "StorageError") if name in kinds)
    return _ERRORS[kind]("; ".join(f"{who}: {each.message}" if who else str(each.message) for who, each in failed.items()))


def do_on_main(world: World, action: Callable[[], Any], what: str) -> Any:
    """Run ``action``, which speaks to no other rank, on rank 0 alone; returns its result, a JSON value. All ranks call it.

    Raises:
        CheckpointError: on all ranks, if it failed: that they cannot do ``what``, and why. A StorageError if nothing but storage failed.
    """
    outcome = Attempt(**world.on_main(asdict(attempt(action, what)) if world.is_main else None))
    if error := failure({"": outcome}):
        raise error
    return outcome.result
