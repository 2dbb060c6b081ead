#!/usr/bin/env python
"""Predict how much domain data a continued run may mix in before it forgets, from small runs with several shares (CMR law).

    python tools/mixture_law.py runs/share_* --general prose --domain code --tokens 20e9 --tolerance 0.02 --output runs/mixture

takes directories of runs from one checkpoint that were evaluated before the first step and several times on the way (evaluation.every),
four shares or more; or one .csv with the columns share, tokens, general_loss, domain_loss (and run where a share has several), whose rows
with 0 tokens say the loss at the start. Writes mixture_law.json and mixture_law.png.

Intervals say what other runs of the same kind would scatter over if the law is right; they say nothing of how far it carries beyond the
tokens of the small runs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_ext.atomic_io import write_json
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.report import formats
from megatron_ext.report.mixture_figure import Prediction, save_mixture_figure
from megatron_ext.report.mixture_law import DOMAIN, GENERAL, Law, Points, fit
from megatron_ext.report.mixture_points import MixtureRuns, read_mixture_runs, read_mixture_table

CURVE_POINTS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        _predict(options, Console(highlight=False, markup=False))
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(options: argparse.Namespace) -> None:
    table = options.inputs[0].suffix == ".csv"
    for holds, message in (
        (not table or len(options.inputs) == 1, f"{len(options.inputs)} inputs; accepted: one .csv, or run directories"),
        (table or (options.general and options.domain), "--general and --domain are needed with run directories: names of sources"),
        (options.tokens is None or 0 < options.tokens < math.inf, f"--tokens {options.tokens}; accepted: more than 0"),
        (0 <= options.tolerance < math.inf, f"--tolerance {options.tolerance}; accepted: nats per token, at least 0"),
        (0 < options.confidence < 1, f"--confidence {options.confidence}; accepted: between 0 and 1"),
        (options.replicates >= 20, f"--replicates {options.replicates}; accepted: at least 20"),
    ):
        if not holds:
            raise ConfigError(message)


def _predict(options: argparse.Namespace, console: Console) -> None:
    """Fit, print, and write the files."""
    table = options.inputs[0].suffix == ".csv"
    runs = read_mixture_table(options.inputs[0]) if table else read_mixture_runs(options.inputs, options.general, options.domain)
    laws = {}
    for kind, form in (("general", GENERAL), ("domain", DOMAIN)):
        points = runs.points(kind, options.from_tokens)
        laws[kind] = fit(form, points, options.replicates, options.resample, options.seed), points
    bound = runs.start + options.tolerance
    target = options.tokens or float(runs.tokens.max())
    predictions = _predictions(laws["general"][0], runs, bound, target, options.confidence)
    console.print(_numbers_table(laws, options.confidence))
    console.print(_prediction_text(laws, runs, bound, predictions[-1], options.confidence))
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "mixture_law.json", _json(laws, runs, bound, predictions, options))
    save_mixture_figure(options.output / "mixture_law.png", laws, bound, predictions, options.confidence)
    console.print(f"results: {options.output}/mixture_law.json, mixture_law.png", soft_wrap=True)


def _predictions(law: Law, runs: MixtureRuns, bound: float, target: float, confidence: float) -> list[Prediction]:
    """The critical share from the fewest tokens of the runs to the target."""
    begin = min(float(runs.tokens.min()), target / 2)
    return [
        Prediction(tokens, law.critical_share(tokens, bound), law.critical_interval(tokens, bound, confidence))
        for tokens in map(float, np.geomspace(begin, target, CURVE_POINTS))
    ]


def _numbers_table(laws: dict[str, tuple[Law, Points]], confidence: float) -> Table:
    table = Table(title="E + A r^p t^m + B t^-q (general), E + A r^-p t^-q (domain)", title_justify="left")
    for column in ("loss", "number", "value", f"{confidence:.0%} interval"):
        table.add_column(column, justify="left" if column in ("loss", "number") else "right")
    for kind, (law, points) in laws.items():
        for name, value in zip(law.form.names, law.numbers, strict=True):
            low, high = law.interval(name, confidence)
            table.add_row(kind, name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
        table.add_row(kind, "rmse", f"{law.rmse:.4g}", f"{len(points.loss)} losses, t in {formats.count(law.unit)} tokens")
        table.add_section()
    return table


def _prediction_text(laws: dict[str, tuple[Law, Points]], runs: MixtureRuns, bound: float, last: Prediction, confidence: float) -> str:
    low, high = last.interval
    text = (
        f"general loss at the start {runs.start:.4f}, accepted {bound:.4f}\n"
        f"critical share of domain data after {formats.count(last.tokens)} tokens: {last.share:.4f} "
        f"({confidence:.0%} interval {low:.4f} to {high:.4f})"
    )
    if last.share == 0:
        return f"{text}\nNo share of domain data keeps the general loss within the tolerance."
    for kind, (law, _) in laws.items():
        low, high = law.loss_interval(last.share, last.tokens, confidence)
        text += f"\n{kind} loss there: {float(law.loss(last.share, last.tokens)):.4f} ({low:.4f} to {high:.4f})"
    if last.tokens > runs.tokens.max():
        text += f"\nThis is {last.tokens / runs.tokens.max():.3g} times the tokens of the runs: an extrapolation."
    return text


def _json(
    laws: dict[str, tuple[Law, Points]],
    runs: MixtureRuns,
    bound: float,
    predictions: Sequence[Prediction],
    options: argparse.Namespace,
) -> dict[str, Any]:
    fitted = {
        kind: {
            "unit_tokens": law.unit,
            "rmse": law.rmse,
            "losses": len(points.loss),
            "numbers": dict(zip(law.form.names, law.numbers.tolist(), strict=True)),
            "intervals": {name: law.interval(name, options.confidence) for name in law.form.names},
        }
        for kind, (law, points) in laws.items()
    }
    curve = [{"tokens": each.tokens, "share": each.share, "interval": each.interval} for each in predictions]
    return {
        "inputs": [str(path) for path in options.inputs],
        "start_general_loss": runs.start,
        "accepted_general_loss": bound,
        "confidence": options.confidence,
        "resample": options.resample,
        "replicates": options.replicates,
        "critical": curve[-1],
        "laws": fitted,
        "critical_by_tokens": curve,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="RUN", help="run directories, or one .csv")
    parser.add_argument("--general", nargs="+", default=[], metavar="SOURCE", help="sources whose loss is to be kept")
    parser.add_argument("--domain", nargs="+", default=[], metavar="SOURCE", help="sources that are learned")
    parser.add_argument("--tokens", type=float, help="of the run to plan; default: most of the small runs")
    parser.add_argument("--tolerance", type=float, default=0.0, help="nats by which the general loss may rise (default %(default)s)")
    parser.add_argument("--from-tokens", type=float, default=0.0, help="leave out losses before, such as those of the warm-up")
    parser.add_argument("--confidence", type=float, default=0.9, help="of the intervals (default %(default)s)")
    parser.add_argument("--replicates", type=int, default=1000, help="resampled fits behind the intervals (default %(default)s)")
    parser.add_argument(
        "--resample",
        choices=("residuals", "runs"),
        default="residuals",
        help="what deviates independently: each loss (default), or only whole runs, which needs 8 or more",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where mixture_law.json and mixture_law.png go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
