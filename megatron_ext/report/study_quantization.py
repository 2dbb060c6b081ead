"""What the models of a study lose when they are quantized after training: what ``tools/study.py`` writes beside each run, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_measures import read_losses
from megatron_ext.report.study_table import Table, cell

FILE = "quantization.json"
"""In the directory of a run: ``settings``, and ``losses`` in nats per token by name of the scheme, ``unquantized`` first."""


def losses(run: Run) -> Mapping[str, float]:
    """Loss by scheme of the run's last checkpoint; empty where it was not quantized. Raises DataError."""
    return read_losses(Path(run.directory) / FILE, "of a quantized run")


def quantization_table(variants: Sequence[Variant]) -> Table | None:
    """Losses by scheme over seeds; None unless every run was quantized by the same schemes."""
    found = [[losses(run) for run in variant.runs] for variant in variants]
    schemes = list(found[0][0])
    if not schemes or any(list(each) != schemes for runs in found for each in runs):
        return None
    return Table(schemes, [[cell(Spread.of([run[scheme] for run in runs]), formats.loss) for scheme in schemes] for runs in found])
