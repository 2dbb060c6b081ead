#!/usr/bin/env python3
"""Prove by the ledger of a run (logging.ledger=true) that no document was left out and none was read twice in an epoch.

    python tools/check_ledger.py runs/pretrain

It says what it checked, and what it could not and why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config import load_config
from megatron_ext.errors import MegatronExtError
from megatron_ext.train.ledger_check import LedgerReport, check_ledger
from megatron_ext.train.sources import CONFIG_FILE


def described(report: LedgerReport) -> list[str]:
    """The report in lines."""
    names = {"trained": "trained on", "skipped": "skipped", "passed_over": "passed over by going back"}
    lines = [f"{name}: {report.rows[kind]:,} steps, {report.tokens[kind]:,} tokens" for kind, name in names.items() if report.rows[kind]]
    lines += [f"source {name}: {epochs} epochs complete" for name, epochs in report.epochs.items()]
    lines += [f"checked: {check}" for check in report.checked] + [f"not checked: {check}" for check in report.unchecked]
    return lines + (report.problems or ["no problem was found"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, 1 if the ledger does not add up, or 2 if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    run = parser.parse_args(arguments).run
    try:
        report = check_ledger(run, load_config(run / CONFIG_FILE, []))
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(described(report)))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
