"""What the mean of a run's last checkpoints loses: what ``tools/study.py`` writes beside each run, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_forgetting import gaps
from megatron_ext.report.study_measures import read_losses
from megatron_ext.report.study_table import Table, cell

FILE = "averages.json"
"""In the directory of a run: ``settings``, and ``losses`` in nats per token by validation source."""


def losses(run: Run) -> Mapping[str, float]:
    """Loss by validation source of the mean of the run's last checkpoints; empty where none was made. Raises DataError."""
    return read_losses(Path(run.directory) / FILE, "of averaged checkpoints")


def averaging_table(variants: Sequence[Variant]) -> Table | None:
    """Losses of the averages by source, and less those of the last checkpoint, over seeds; None unless every run was averaged."""
    found = [[losses(run) for run in variant.runs] for variant in variants]
    sources = list(found[0][0])
    if not sources or any(list(each) != sources for runs in found for each in runs):
        return None
    columns = [name for source in sources for name in (source, f"{source}: to the last")]
    return Table(columns, [[each for source in sources for each in _cells(variant, source)] for variant in variants])


def _cells(variant: Variant, source: str) -> list[tuple[str, str]]:
    averaged = [losses(run)[source] for run in variant.runs]
    ways = [gaps(run)[source] for run in variant.runs]
    changes = [mean - (way.start + way.final_difference) for mean, way in zip(averaged, ways, strict=True)]
    return [cell(Spread.of(averaged), formats.loss), cell(Spread.of(changes), formats.loss)]
