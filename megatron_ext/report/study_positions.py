"""Where in documents the variants of a study predict better: the last loss of each validation source by bucket of positions."""

from collections.abc import Mapping, Sequence

from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_table import Table, cell
from megatron_ext.report.summary import evaluations

Buckets = Mapping[tuple[str, float], float]
"""Loss by source and position that its bucket begins at."""


def position_losses(run: Run) -> Buckets:
    """At the last evaluation, of the sources that have tokens in more than one bucket."""
    last = {source: curve[-1].by_position for (source, _), curve in evaluations(run.evals).items()}
    return {(source, bucket["start"]): bucket["loss"] for source, buckets in last.items() if len(buckets) > 1 for bucket in buckets}


def positions_table(variants: Sequence[Variant]) -> Table | None:
    """Losses by bucket over seeds; None unless every run has the same buckets."""
    found = [[position_losses(run) for run in variant.runs] for variant in variants]
    keys = list(found[0][0])
    if not keys or any(list(each) != keys for runs in found for each in runs):
        return None
    columns = [f"{source} from {formats.count(start)}" for source, start in keys]
    return Table(columns, [[cell(Spread.of([run[key] for run in runs]), formats.loss) for key in keys] for runs in found])
