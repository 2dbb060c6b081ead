"""What it costs that a run watches itself: seconds a step with each instrument, beside the run without any.

    bash examples/prepare_corpus.sh
    python tools/bench_watching.py --rounds 3

Each way is a run of its own, started as a user starts it, one process; rounds alternate between the ways. Seconds are those from the end of
the first step to the end of the last, with all that is written in between, and without evaluations and checkpoints.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_ranks import print_ratios
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "nothing": ["train.hang_timeout=null"],
    "the watchdog for hangs": [],
    "probes every 50 steps": ["logging.probes_every=50"],
    "digests every 50 steps": ["logging.digests_every=50"],
    "digests every step": ["logging.digests_every=1"],
    "a ledger of every document": ["logging.ledger=true"],
    "rules for bad steps": ["train.skip.loss_deviations=8", "train.skip.grad_norm_deviations=8"],
}
"""Overrides of each way; the watchdog is on unless it is switched off."""


def seconds_per_step(config: Path, overrides: list[str], steps: int) -> float:
    """Of a new run of ``steps`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"run_dir={folder}/run",
            f"train.steps={steps}",
            "evaluation.every=null",
            "checkpoint.every=null",
            "logging.tensorboard=false",
        ]
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--config", str(config), *fixed, *overrides]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        lines = Path(folder, "run", "metrics.jsonl").read_text("utf-8").splitlines()
    times = {record["step"]: record["time"] for record in map(json.loads, lines) if record["kind"] == "train"}
    return (times[steps] - times[1]) / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples/configs/quickstart_pretrain.yaml")
    parser.add_argument("--steps", type=int, default=101, help="of each run; what happens every 50 steps happens at the last one too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in track(range(arguments.rounds), description="rounds"):
        for name, overrides in WAYS.items():
            seconds[name].append(seconds_per_step(arguments.config, [*arguments.overrides, *overrides], arguments.steps))
    print_ratios(f"{arguments.steps} steps of {arguments.config.name}", "watched by", "nothing", seconds, "s a step", "less", digits=3)


if __name__ == "__main__":
    main()
