"""The final table for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.report import formats
from megatron_ext.report.plans import sharing
from megatron_ext.report.summary import Phase, headline, results


def print_results(phases: Sequence[Phase], console: Console) -> None:
    """Print the headline, the final table and, where ranks shared packs, how; losses and entropies in nats per token."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="loss and unigram entropy in nats per token", caption_justify="left")
    table.add_column("phase", no_wrap=True)
    table.add_column("source")
    for name in ("first", "last", "change", "unigram", "tokens", "epochs"):
        table.add_column(name, justify="right")
    phase = None
    for row in results(phases):
        if phase is not None and row.phase is not phase:
            table.add_section()
        label = row.phase.label if row.phase is not phase else ""
        phase = row.phase
        # Text and not str: names may hold square brackets, which are markup to rich
        table.add_row(
            Text(label),
            Text(row.name),
            formats.loss(row.first_loss),
            formats.loss(row.last_loss),
            formats.percent(row.change),
            formats.loss(row.unigram_entropy),
            formats.count(row.tokens),
            formats.number(row.epochs),
        )
    console.print(Text(headline(phases)))
    console.print(table)
    if shared := sharing(phases):
        console.print(Text("; ".join(f"{name.lower()}: {value}" for name, value in shared.facts.items())))
