#!/usr/bin/env python3
"""Spoil valid files of every format in thousands of ways, and read them: each case must load, or be refused by a named error.

    python tools/fuzz.py --cases 10000 --format idx --seed 1
    python tools/fuzz.py --cases 1000 --report fuzz.md

Cases run in a process of their own under limits of memory and time; a case that ends it counts as failed and the next ones go on.
A case is decided by seed, format and number: ``--first N --cases 1`` runs it alone.
"""

import argparse
import os
import select
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.fuzz.target import Instance, Target
from tests.fuzz.targets import TARGETS

PATIENCE_SECONDS = 120.0
"""Wall time after which a silent case counts as hanging."""
MOST_SHOWN = 20
MEMORY_DISK = Path("/dev/shm")
"""Cases write and flush files, which takes a disk longer than reading them takes."""


@dataclass
class Tally:
    """What became of the cases of one format."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> str:
        """A line of a table."""
        cases = sum(self.outcomes.values()) + len(self.failures)
        outcomes = ", ".join(f"{name} {count:,}" for name, count in sorted(self.outcomes.items()))
        return f"| {name} | {cases:,} | {cases / max(self.seconds, 1e-9):.0f} | {outcomes} | {len(self.failures)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 if a case failed."""
    options = _parser().parse_args(arguments)
    lines = ["| format | cases | cases/s | outcomes | failed |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    failed = 0
    for name in options.format or list(TARGETS):
        tally = fuzz(name, TARGETS[name], options.seed, range(options.first, options.first + options.cases))
        lines.append(tally.row(name))
        print(lines[-1], flush=True)
        for failure in tally.failures[:MOST_SHOWN]:
            print(failure, file=sys.stderr, flush=True)
        failed += len(tally.failures)
    if options.report is not None:
        options.report.write_text("\n".join([*_heading(options), *lines]) + "\n", "utf-8")
    return int(failed > 0)


def _heading(options: argparse.Namespace) -> list[str]:
    command = f"python tools/fuzz.py --cases {options.cases} --seed {options.seed} --first {options.first}"
    what = "each case spoils a valid file and reads it, which must load, or be refused by a named error in words that name the file."
    return ["# Spoilt files", "", f"`{command}`: {what}", ""]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=list(TARGETS), help="may be repeated (default: all)")
    parser.add_argument("--cases", type=int, default=1000, help="of each format (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="decides the cases (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (default: 0)")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="also write the table there")
    return parser


def fuzz(name: str, target: Target, seed: int, cases: range) -> Tally:
    """Run ``cases`` in processes that are replaced when a case ends them."""
    tally, begin = Tally(), time.monotonic()
    while cases:
        case = cases.start
        for case, outcome in _in_process(name, target, seed, cases):
            if outcome.startswith("failed"):
                tally.failures.append(f"{name}, seed {seed}, case {case}: {outcome}")
            else:
                tally.outcomes[outcome] += 1
        cases = range(case + 1, cases.stop)
    tally.seconds = time.monotonic() - begin
    return tally


def _in_process(name: str, target: Target, seed: int, cases: range) -> Iterator[tuple[int, str]]:
    """(case, outcome) of each case until one ends the process; of that too."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _serve(name, target, seed, cases, writer)
    os.close(writer)
    done = cases.start
    hung = False
    with open(reader, "rb", buffering=0) as answers:  # select does not see what is buffered
        while done < cases.stop:
            if not select.select([answers], [], [], PATIENCE_SECONDS)[0]:
                hung = True
                os.kill(child, 9)
            if not (line := answers.readline()):
                break
            yield done, line.decode("utf-8", "replace").rstrip("\n").replace("\x1e", "\n")
            done += 1
    _, status = os.waitpid(child, 0)
    if done < cases.stop:
        yield done, f"failed: {'no answer' if hung else 'the process ended'}, wait status {status}"


def _serve(name: str, target: Target, seed: int, cases: range, answers: int) -> None:
    """Run cases and write a line for each, then end the process, whatever happens."""
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
            instance = Instance(target, Path(folder))
            for case in cases:
                os.write(answers, _answer(instance, Random(f"{seed}/{name}/{case}")))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _answer(instance: Instance, random: Random) -> bytes:
    try:
        outcome = instance.case(random)
    except BaseException:
        outcome = f"failed: {traceback.format_exc(limit=-8)[-3000:]}"
    return (outcome.rstrip("\n").replace("\n", "\x1e") + "\n").encode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
