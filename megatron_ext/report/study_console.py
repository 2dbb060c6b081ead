"""The final table of a study for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.report import formats
from megatron_ext.report.study import Variant, headline, results, validation_loss, warnings
from megatron_ext.report.study_table import cells, column_names


def print_study(variants: Sequence[Variant], console: Console) -> None:
    """Print headline, warnings, the swept values with their losses and the final table; losses in nats per token."""
    console.print(Text(headline(variants)))
    for warning in warnings(variants):
        console.print(Text(f"warning: {warning}"))
    for variant in variants:
        losses = ", ".join(f"{formats.learning_rate(value)} {formats.loss(validation_loss(run))}" for value, run in variant.sweep.items())
        if losses:
            console.print(Text(f"swept: {variant.name}, {variant.key}: {losses}"))
    console.print(_table(variants))


def _table(variants: Sequence[Variant]) -> Table:
    seeds = ", ".join(map(str, variants[0].seeds))
    caption = f"mean over seeds {seeds}, below it the lowest and the highest; loss in nats per token"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in column_names(variants):
        table.add_column(Text(name), justify="right")
    table.add_column("setting")
    for row in results(variants):
        table.add_row(Text(row.variant.name), *("\n".join(cell) for cell in cells(row)), Text(row.variant.setting.replace(" ", "\n")))
    return table
