#!/usr/bin/env python3
"""Hurt a small supervised run in every way for a while, and prove that it ends as if nothing had happened.

    python tools/soak.py --minutes 30 --seed 1 --output runs/soak

Four gloo ranks train under ``tools/supervise.py``. Faults come at random moments, drawn from the seed: ranks are killed and frozen, the
disk of the checkpoints is filled (a small tmpfs, as root), the newest checkpoint is damaged, the run is asked to stop. After each the run
must train again, and a checkpoint must be whole. At the end the same steps are trained without faults: losses, gradient norms and the files
of the last checkpoint must be equal bit for bit, and the ledger of the run must prove that every document was read once an epoch.
OUTPUT/soak.md tells what was done and what came of it. Ctrl-C ends the faults early, and the report says how long they lasted. Exit code 1
if anything differs, does not recover or does not add up.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from soak_faults import KINDS, Fault, inject, schedule
from soak_report import Outcome, Report, compare, ledger_of, write_report
from soak_run import NoRecovery, SoakRun, small_disk, write_config

from megatron_ext.train.metrics import METRICS_FILE
from megatron_ext.train.supervisor_log import last_step

GRID = {"tp": 2, "pp": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, metavar="M", help="hurt the run for so long")
    length.add_argument("--faults", type=int, metavar="N", help="hurt the run so often")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where run and report go; must not exist")
    parser.add_argument("--kinds", default=",".join(KINDS), help="faults to draw from (%(default)s)")
    parser.add_argument(
        "--gap", type=float, default=4.0, metavar="S", help="longest time between recovery and the next fault (%(default)s)"
    )
    parser.add_argument("--launcher", action="store_true", help="start ranks through the deepspeed launcher, not as forks")
    options = parser.parse_args(arguments)
    kinds = tuple(options.kinds.split(","))
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds: {options.kinds}; accepted: {', '.join(KINDS)}")
    if options.output.exists():
        parser.error(f"--output: {options.output} exists")
    # So that what was started and mounted is taken away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    enough = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: enough.set())
    report = soak(options, kinds, enough)
    write_report(options.output / "soak.md", report)
    print((options.output / "soak.md").read_text("utf-8"))
    return 0 if report.passed else 1


def soak(options: argparse.Namespace, kinds: tuple[str, ...], enough: threading.Event) -> Report:
    """The whole soak: hurt, stop, train the same steps again, compare."""
    output, begin, load = options.output, time.monotonic(), [os.getloadavg()[0]]
    config = write_config(output, GRID)
    with small_disk(output / "run" / "checkpoints") as obstacle:
        if obstacle and "disk_full" in kinds:
            print(f"soak: no disk is filled: {obstacle}", flush=True)
            kinds = tuple(kind for kind in kinds if kind != "disk_full")
        run = SoakRun(config, output / "run", launcher=options.launcher, log=output / "console.log")
        try:
            outcomes = hurt(run, options, kinds, load, enough)
            if outcomes and outcomes[-1].recovered:
                run.stop()
        finally:
            run.kill()
        hurt_seconds = time.monotonic() - begin
        steps = last_step(output / "run" / METRICS_FILE)
        print(f"soak: {len(outcomes)} faults and {steps} steps in {hurt_seconds:.0f} s; now the same steps undisturbed", flush=True)
        undisturbed = SoakRun(config, output / "undisturbed", launcher=options.launcher, log=output / "undisturbed.log", steps=steps)
        try:
            undisturbed.wait_for_end()
        finally:
            undisturbed.kill()
        load.append(os.getloadavg()[0])
        comparison, ledger = compare(output / "run", output / "undisturbed", steps), ledger_of(output / "run")
        shutil.rmtree(output / "run" / "checkpoints", ignore_errors=True)
    return Report(
        options.seed, hurt_seconds, time.monotonic() - begin, load, obstacle, outcomes, comparison, ledger, run.events(), options.launcher
    )


def hurt(run: SoakRun, options: argparse.Namespace, kinds: tuple[str, ...], load: list[float], enough: threading.Event) -> list[Outcome]:
    """Inject faults until time or faults are used up, or it is ``enough``; ends early if the run does not recover."""
    run.start()
    run.wait_until_trains(after=time.time())
    outcomes: list[Outcome] = []
    end = time.monotonic() + 60 * (options.minutes or 1e9)
    for fault in schedule(options.seed, kinds, options.gap):
        if enough.is_set() or time.monotonic() >= end or len(outcomes) == options.faults:
            break
        outcomes.append(one(run, fault))
        load.append(os.getloadavg()[0])
        print(f"soak: {len(outcomes)}. {outcomes[-1]}", flush=True)
        if not outcomes[-1].recovered:
            break
    return outcomes


def one(run: SoakRun, fault: Fault) -> Outcome:
    """Wait for the fault's moment, inject it, and wait until the run trains again."""
    run.wait_for_moment(fault)
    before, events, begin = run.step(), len(run.events()), time.time()
    done = inject(fault, run)
    what = done.what
    whole = run.newest_whole()
    try:
        run.recover(fault, begin)
        recovered = True
    except NoRecovery as error:
        what, recovered = f"{what}; {error}", False
    new = run.events()[events:]
    starts = [event for event in new if event["event"] in ("start", "restart")]
    lost = max(0, before - starts[0]["step"]) if starts else 0
    return Outcome(fault.kind, what, before, time.time() - begin, recovered, whole is not None, len(starts), lost, done.met)


if __name__ == "__main__":
    sys.exit(main())
