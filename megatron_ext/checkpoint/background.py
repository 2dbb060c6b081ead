"""A save that goes on while training does: threads write, and the ranks meet between steps."""

from collections.abc import Generator
from concurrent.futures import Executor, Future

from megatron_ext.checkpoint.attempts import Attempt, attempt
from megatron_ext.checkpoint.save import CheckpointWriter, Saved, SaveJob


class BackgroundSave:
    """A save whose values were copied.

    A thread of each rank writes the rank's part; when all have, a thread of rank 0 publishes the checkpoint. Threads speak to nobody: that
    all have ended, and how, the ranks tell each other in ``look`` and ``wait``, which all call at the same moments.

    Args:
        writer: of the run.
        job: begun with ``copied``.
        thread: runs one task after another.
    """

    def __init__(self, writer: CheckpointWriter, job: SaveJob, thread: Executor) -> None:
        self.step = job.step
        self._world = writer.world
        self._task: Future[Attempt] = thread.submit(attempt, lambda: writer.write_part(job))
        self._stages = self._run(writer, job, thread)

    def look(self) -> Saved | None:
        """The checkpoint, if it is in its place by now. Does not wait; errors as of ``CheckpointWriter.save``."""
        return None if self._world.any(not self._task.done()) else self._advance()

    def wait(self) -> Saved:
        """The checkpoint, when it is in its place; otherwise as ``look``."""
        while (saved := self._advance()) is None:
            pass
        return saved

    def _advance(self) -> Saved | None:
        return next(self._stages)

    def _run(self, writer: CheckpointWriter, job: SaveJob, thread: Executor) -> Generator[Saved | None, None, None]:
        parts = writer.gather(job, self._task.result())
        if writer.world.is_main:
            self._task = thread.submit(attempt, lambda: writer.publish(job, parts))
        yield None
        yield writer.settle(job, parts, self._task.result() if writer.world.is_main else None)
