"""What the variants of a study of continued runs learned and forgot: a loss for each validation source, and the worst on the way."""

from collections.abc import Mapping, Sequence

from megatron_ext.report import formats
from megatron_ext.report.forgetting import StabilityGap, stability_gap
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_table import Table, cell
from megatron_ext.report.summary import evaluations


def gaps(run: Run) -> Mapping[str, StabilityGap]:
    """The way of each validation loss of a run, by source."""
    return {source: stability_gap(curve) for (source, _), curve in evaluations(run.evals).items()}


def continues(run: Run) -> bool:
    """The run began from a model that was trained before."""
    model = run.config.get("model")
    return isinstance(model, dict) and model.get("init_from") is not None


def forgetting_table(variants: Sequence[Variant]) -> Table | None:
    """Last loss of each source, and how far it rose above the start at its worst, over seeds; None unless every run continues a model."""
    runs = [run for variant in variants for run in variant.runs]
    sources = list(gaps(runs[0]))
    if not all(continues(run) and list(gaps(run)) == sources for run in runs):
        return None
    columns = [name for source in sources for name in (source, f"{source}: worst rise")]
    return Table(columns, [[each for source in sources for each in _cells(variant, source)] for variant in variants])


def _cells(variant: Variant, source: str) -> list[tuple[str, str]]:
    found = [gaps(run)[source] for run in variant.runs]
    final = Spread.of([gap.start + gap.final_difference for gap in found])
    return [cell(final, formats.loss), cell(Spread.of([gap.worst_rise for gap in found]), formats.loss)]
