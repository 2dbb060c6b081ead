#!/usr/bin/env python3
"""Write one self-contained HTML page about one or more runs.

    python tools/report.py runs/pretrain runs/continual --compare "without replay=runs/no_replay" --text

Runs are given in the order in which they happened: each continues the model of the one before.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ext.errors import DataError, MegatronExtError
from megatron_ext.report.console import print_results
from megatron_ext.report.metrics import Run, read_run
from megatron_ext.report.page import write_report
from megatron_ext.report.summary import arrange


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        runs = [read_run(directory) for directory in options.runs]
        compare = _read_controls(options.compare)
        output = options.output or options.runs[-1] / "report.html"
        if not output.parent.is_dir():
            raise DataError(f"{output}: there is no directory {output.parent}")
        write_report(runs, output, compare)
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.text:
        print_results(arrange(runs, compare), console)
    console.print(f"report: {output}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; several in the order of the phases")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="where to write the page (default: report.html in the last RUN)")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="LABEL=RUN",
        help="a control run, drawn beside the last RUN, of which it is an alternative; may be repeated",
    )
    parser.add_argument("--text", action="store_true", help="also print the final table")
    return parser


def _read_controls(texts: Sequence[str]) -> dict[str, Run]:
    controls: dict[str, Run] = {}
    for text in texts:
        label, separator, directory = text.partition("=")
        if not (label and separator and directory):
            raise DataError(f"--compare {text!r}: expected LABEL=RUN, a name for the control run and its directory")
        if label in controls:
            raise DataError(f"--compare {text!r}: the label {label!r} is already that of {controls[label].directory}")
        controls[label] = read_run(directory)
    return controls


if __name__ == "__main__":
    sys.exit(main())
