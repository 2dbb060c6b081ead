"""The final table of a study as text, for the page and for a terminal."""

from collections.abc import Callable, Sequence

from megatron_ext.report import formats
from megatron_ext.report.study import Result, Spread, Variant

Cell = tuple[str, str]
"""A mean over seeds, and the lowest and highest beside it; either may be empty."""


def column_names(variants: Sequence[Variant]) -> list[str]:
    """Of the numbers in a row."""
    return ["validation loss", f"to {variants[0].name}", "training loss", "time of a step", "whole time", "one run"]


def cells(row: Result) -> list[Cell]:
    """The numbers of a row, in the order of ``column_names``."""
    return [
        _cell(row.validation, formats.loss),
        ("", "") if row.difference is None else _cell(row.difference, percent),
        _cell(row.training, formats.loss),
        _cell(row.step_ratio, formats.number, " x"),
        _cell(row.whole_ratio, formats.number, " x"),
        _cell(row.seconds, formats.seconds),
    ]


def percent(value: float) -> str:
    """A small difference in percent with its sign, to two decimals."""
    return formats.percent(value, decimals=2)


def _cell(spread: Spread, text: Callable[[float], str], unit: str = "") -> Cell:
    mean, low, high = map(text, spread)
    return f"{mean}{unit}", "" if low == high else f"{low} to {high}"
