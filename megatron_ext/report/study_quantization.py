"""What the models of a study lose when they are quantized after training: what ``tools/study.py`` writes beside each run, and its table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.errors import DataError
from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_table import Table, cell

FILE = "quantization.json"
"""In the directory of a run: ``settings``, and ``losses`` in nats per token by name of the scheme, ``unquantized`` first."""


def losses(run: Run) -> Mapping[str, float]:
    """Loss by scheme of the run's last checkpoint; empty where it was not quantized.

    Raises:
        DataError: the file is not one that ``tools/study.py`` wrote.
    """
    path = Path(run.directory) / FILE
    if not path.exists():
        return {}
    try:
        return {str(scheme): float(loss) for scheme, loss in json.loads(path.read_text("utf-8"))["losses"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not the losses of a quantized run: {error!r}; remove it and run the study again") from None


def quantization_table(variants: Sequence[Variant]) -> Table | None:
    """Losses by scheme over seeds; None unless every run was quantized by the same schemes."""
    found = [[losses(run) for run in variant.runs] for variant in variants]
    schemes = list(found[0][0])
    if not schemes or any(list(each) != schemes for runs in found for each in runs):
        return None
    return Table(schemes, [[cell(Spread.of([run[scheme] for run in runs]), formats.loss) for scheme in schemes] for runs in found])
