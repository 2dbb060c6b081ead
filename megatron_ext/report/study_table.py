"""The tables of a study as text, for the page and for a terminal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_ext.report import formats
from megatron_ext.report.study import Result, Spread, Variant, results

Cell = tuple[str, str]
"""A mean over seeds, and the lowest and highest beside it; either may be empty."""


class Table(NamedTuple):
    """Numbers of every variant, in the order of the study."""

    columns: list[str]
    rows: list[list[Cell]]


def results_table(variants: Sequence[Variant]) -> Table:
    """Losses, difference and times."""
    names = ["validation loss", f"to {variants[0].name}", "training loss", "time of a step", "whole time", "one run"]
    return Table(names, [_cells(row) for row in results(variants)])


def _cells(row: Result) -> list[Cell]:
    return [
        cell(row.validation, formats.loss),
        ("", "") if row.difference is None else cell(row.difference, percent),
        cell(row.training, formats.loss),
        cell(row.step_ratio, formats.number, " x"),
        cell(row.whole_ratio, formats.number, " x"),
        cell(row.seconds, formats.seconds),
    ]


def percent(value: float) -> str:
    """A small difference in percent with its sign, to two decimals."""
    return formats.percent(value, decimals=2)


def cell(spread: Spread, text: Callable[[float], str], unit: str = "") -> Cell:
    """A number over seeds, each part of it as ``text`` says it."""
    mean, low, high = map(text, spread)
    return f"{mean}{unit}", "" if low == high else f"{low} to {high}"
