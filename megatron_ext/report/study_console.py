"""The final table of a study for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.report import formats, study_table
from megatron_ext.report.study import Variant, headline, validation_loss, warnings
from megatron_ext.report.study_averaging import averaging_table
from megatron_ext.report.study_forgetting import forgetting_table
from megatron_ext.report.study_inside import has_probes, inside_table
from megatron_ext.report.study_positions import positions_table
from megatron_ext.report.study_quantization import quantization_table

WIDEST = 1000
"""Characters of a line of a table."""


def print_study(variants: Sequence[Variant], console: Console) -> None:
    """Print headline, warnings, the swept values with their losses and the final table; losses in nats per token."""
    console.print(Text(headline(variants)))
    for warning in warnings(variants):
        console.print(Text(f"warning: {warning}"))
    for variant in variants:
        losses = ", ".join(f"{formats.learning_rate(value)} {formats.loss(validation_loss(run))}" for value, run in variant.sweep.items())
        if losses:
            console.print(Text(f"swept: {variant.name}, {variant.key}: {losses}"))
    _print(console, _table(variants, study_table.results_table(variants), "loss in nats per token", settings=True))
    for numbers, what in (
        (forgetting_table(variants), "last loss of each source, and its worst rise above the start"),
        (positions_table(variants), "last loss of each source, by position in documents"),
        (averaging_table(variants), "loss of the mean of the last checkpoints, and how much more that is than of the last alone"),
        (quantization_table(variants), "loss in nats per token after quantization"),
    ):
        if numbers is not None:
            _print(console, _table(variants, numbers, what))
    if has_probes(variants):
        _print(
            console, _table(variants, inside_table(variants), "excess kurtosis (that of normal noise), largest over smallest over depth")
        )


def _print(console: Console, table: Table) -> None:
    """``table`` with all of every cell: where the console is too narrow, its lines are longer than the console is wide."""
    needed = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


def _table(variants: Sequence[Variant], numbers: study_table.Table, what: str, settings: bool = False) -> Table:
    seeds = ", ".join(map(str, variants[0].seeds))
    caption = f"mean over seeds {seeds}, below it the lowest and the highest; {what}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in numbers.columns:
        table.add_column(Text(name), justify="right")
    if settings:
        table.add_column("setting")
    for variant, row in zip(variants, numbers.rows, strict=True):
        setting = [Text(variant.setting.replace(" ", "\n"))] if settings else []
        table.add_row(Text(variant.name), *("\n".join(cell) for cell in row), *setting)
    return table
