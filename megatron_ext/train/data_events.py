"""What happens to the data while a run goes on: a stage begins, or a source has been read too often."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.data.sampler import Sampler


@dataclass(frozen=True)
class DataEvent:
    """Something to write and to say once."""

    name: str
    fields: dict[str, Any]
    message: str


class DataWatch:
    """Notices events between looks at a mixture.

    It has no state to save: what it compares with is where the mixture stands when it is made, so that a run that was resumed tells
    each event once.

    Args:
        mixture: of the run, where training goes on.
        most_epochs: a source that is read more often is told about; null: none is.
    """

    def __init__(self, mixture: Sampler, most_epochs: float | None) -> None:
        self._mixture, self._most_epochs = mixture, most_epochs
        self._stage, self._epochs = mixture.stage, mixture.epochs()

    def look(self) -> list[DataEvent]:
        """What happened since the last look."""
        stage, epochs = self._mixture.stage, self._mixture.epochs()
        events = [] if stage == self._stage else [self._begun()]
        events += [
            self._repeated(name, now)
            for name, now in epochs.items()
            if self._most_epochs is not None and self._epochs[name] <= self._most_epochs < now
        ]
        self._stage, self._epochs = stage, epochs
        return events

    def unreached(self) -> list[DataEvent]:
        """Stages that did not begin, at the end of a run: steps may hold fewer tokens than those that a stage begins after."""
        stages = self._mixture.stages
        reached = stages.index(self._mixture.stage)
        return [
            DataEvent(
                "stage_not_reached",
                {"stage": number, "begin": stage.begin, "begin_step": stage.begin_step},
                f"warning: stage {number} of the data, from {stage.where} on, never began",
            )
            for number, stage in enumerate(stages)
            if number > reached
        ]

    def _begun(self) -> DataEvent:
        stage = self._mixture.stage
        number = self._mixture.stages.index(stage)
        message = f"stage {number} of the data begins: sequences of at most {stage.sequence_length:,} tokens"
        return DataEvent("stage", {"stage": number, "sequence_length": stage.sequence_length}, message)

    def _repeated(self, name: str, epochs: float) -> DataEvent:
        message = f"warning: source {name!r} has been read {epochs:.2f} times, more than data.repeats_warned_at ({self._most_epochs:g})"
        return DataEvent("repeated_data", {"source": name, "epochs": epochs}, message)
