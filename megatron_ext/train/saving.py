"""When a run's checkpoints are written, what is said about them, and what follows if one cannot be written."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.background import BackgroundSave
from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.checkpoint.save import CheckpointWriter, Saved, SavedOptimizer
from megatron_ext.errors import CheckpointError, StorageError
from megatron_ext.train.console import Console
from megatron_ext.train.metrics import MetricsWriter


def is_asynchronous(options: CheckpointOptions, device: torch.device) -> bool:
    """Whether training goes on while checkpoints are written."""
    return device.type != "cpu" if options.asynchronous is None else options.asynchronous


class Saving:
    """Saves of a run, at most one at a time. All ranks make one and call its methods at the same moments.

    Args:
        writer: writes the checkpoints.
        options: whether in the background, and what follows a failure.
        metrics: gets an event ``save``, ``evict``, ``evict_failed`` or ``save_failed``.
        console: gets a line.
        resumed_from: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        options: CheckpointOptions,
        metrics: MetricsWriter,
        console: Console,
        resumed_from: Path | None = None,
    ) -> None:
        self._writer, self._options, self._metrics, self._console = writer, options, metrics, console
        self._asynchronous = is_asynchronous(options, writer.world.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: BackgroundSave | None = None
        self._tokens = 0
        self._stall = 0.0
        # A checkpoint of another run is not this run's to go back to.
        own = resumed_from is not None and resumed_from.resolve().parent == writer.root.resolve()
        self._newest = resumed_from if own else None

    def save(self, step: int, weight: Callable[[str], torch.Tensor], optimizer: SavedOptimizer, state: dict[str, Any], last: bool) -> None:
        """Save step ``step``; the other arguments as of ``CheckpointWriter.save``.

        Args:
            last: the run ends here: wait until the checkpoint is in its place, and fail if it cannot be.

        Raises:
            CheckpointError: see there; a StorageError only if ``last``, or ``checkpoint.on_failure`` is ``stop``.
        """
        begin = time.perf_counter()
        self._end(lambda pending: pending.wait())
        self._tokens, background = state["tokens"], self._asynchronous and not last
        try:
            if background:
                job = self._writer.begin(step, weight, optimizer, state, copied=True)
                self._pending = BackgroundSave(self._writer, job, self._thread)
            else:
                saved = self._writer.save(step, weight, optimizer, state)
        except StorageError as error:
            self._failed(step, error, last)
            return
        self._stall = time.perf_counter() - begin
        if not background:
            self._tell(step, saved, background)

    def look(self) -> None:
        """To be called after every step: say what became of a save in the background."""
        self._end(lambda pending: pending.look())

    def newest(self) -> Path | None:
        """The run's newest checkpoint, waited for if it is being written; None if it has none of its own."""
        self._end(lambda pending: pending.wait())
        return self._newest

    def end(self) -> None:
        """Wait for a save in the background of a run that something else ends: its failure is said, and does not take that one's place."""
        with suppress(CheckpointError):
            self._end(lambda pending: pending.wait(), last=True)

    def amend(self, checkpoint: Path, changes: Mapping[str, Any]) -> None:
        """See ``CheckpointWriter``."""
        self._writer.amend(checkpoint, changes)

    def _end(self, result: Callable[[BackgroundSave], Saved | None], last: bool = False) -> None:
        if self._pending is None:
            return
        pending = self._pending
        try:
            saved = result(pending)
        except CheckpointError as error:
            if not last and not isinstance(error, StorageError):
                raise
            self._pending = None
            self._failed(pending.step, error, last)
            return
        if saved is not None:
            self._pending = None
            self._tell(pending.step, saved, background=True)

    def _tell(self, step: int, saved: Saved, background: bool) -> None:
        self._newest = saved.path
        at = {"step": step, "tokens": self._tokens}
        times = {"seconds": saved.seconds, "stall_seconds": self._stall, "asynchronous": background}
        self._metrics.write("event", event="save", **at, path=str(saved.path), num_bytes=saved.num_bytes, **times)
        beside = f" beside training, which waited {self._stall:.2f} s" if background else ""
        self._console.say(f"saved {saved.path} in {saved.seconds:.1f} s{beside}")
        for name in saved.evicted:
            self._metrics.write("event", event="evict", **at, checkpoint=name)
        for problem in saved.not_removed:
            self._metrics.write("event", event="evict_failed", **at, error=problem)
            self._console.say(f"step {step}: {problem}. It is tried again after the next save")

    def _failed(self, step: int, error: CheckpointError, last: bool) -> None:
        stops = last or self._options.on_failure == "stop"
        self._console.say(f"step {step}: {error}. The run {'stops' if stops else 'goes on, as checkpoint.on_failure says'}")
        self._metrics.write("event", event="save_failed", step=step, tokens=self._tokens, error=str(error))
        if stops:
            raise error
