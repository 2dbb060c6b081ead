"""How long planning takes, and how far the predicted seconds of plans are from what no plan can go below.

    python tools/bench_planner.py
    python tools/bench_planner.py --in-rounds --lengths lengths.npz --batches 12 --policies adaptive best_static static:64
    python tools/bench_planner.py --documents 131072 --devices 16384 --batches 1 --policies adaptive

Seconds of steps are predicted by the cost model of FlexSP's 7B model on A100-40GB (Wang et al. 2025, arXiv:2412.01523). Without rounds,
parameters are not gathered for every pack: a pack then costs ``--per-pack`` of what it costs with ZeRO-3.
Milliseconds are of this process's processor time, which other processes do not disturb, except what is compiled at first use.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_ext.planning import CostModel, Plan, lower_bound, plan_step, presets
from megatron_ext.planning.lengths import length_distribution
from megatron_ext.planning.timeline import pack_seconds, timeline

MS = 1e3


@dataclass(frozen=True)
class Row:
    """One policy on one batch. Times in seconds."""

    planning: list[float]
    """All of ``plan_step``, of each repetition."""
    building: list[float]
    """The part of it that makes the Plan's objects."""
    encoding: list[float]
    predicted: float


def main() -> None:
    args = arguments()
    batches = [draw(args, number) for number in range(args.batches)]
    cost = cost_of(args)
    bounds = [bound(lengths, args, cost) for lengths in batches]
    table = Table(title=title(args, cost, batches), title_justify="left")
    for name in ("policy", "plan ms min", "median", "max", "of it Plan", "encode ms", "seconds / bound, mean", "max"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy in args.policies:
        rows = [measure(policy, lengths, args, cost) for lengths in batches]
        planning = [MS * each for row in rows for each in row.planning]
        parts = [median([MS * each for row in rows for each in part(row)]) for part in (lambda r: r.building, lambda r: r.encoding)]
        ratios = [row.predicted / floor for row, floor in zip(rows, bounds, strict=True)]
        times = [min(planning), median(planning), max(planning), *parts]
        table.add_row(policy, *(f"{each:.2f}" for each in times), f"{mean(ratios):.4f}", f"{max(ratios):.4f}")
    Console(width=140).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="wikipedia-like", help="an .npz file with an array `lengths`, or wikipedia-like, github-like")
    parser.add_argument("--documents", type=int, default=512, help="of a step")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--longest", type=int, default=384 * 1024, help="tokens; longer documents are left out")
    parser.add_argument("--in-rounds", action="store_true", help="ranks wait for each other between packs, as with ZeRO-3 or a pipeline")
    parser.add_argument("--per-pack", type=float, help="of the published seconds of a micro-batch; default 1 in rounds, else 0.05")
    parser.add_argument("--largest-degree", type=int)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=["adaptive", "best_static"], help="static:DEGREE for a static one")
    parser.add_argument("--bound", choices=("area", "lp"), default="area", help="method of the lower bound; lp takes seconds")
    return parser.parse_args()


def draw(args: argparse.Namespace, number: int) -> list[int]:
    """The lengths of one batch."""
    rng = np.random.default_rng(args.seed + number)
    if Path(args.lengths).suffix == ".npz":
        known = np.load(args.lengths)["lengths"]
    else:
        known = length_distribution(args.lengths).sample(2 * args.documents + 1000, rng)
    return rng.choice(known[known <= args.longest], args.documents).tolist()


def cost_of(args: argparse.Namespace) -> CostModel:
    """Published costs; the memory is that of 64 ranks with ZeRO-3, whatever the devices, so that sizes can be compared."""
    published = presets.cost_model(presets.hardware("a100_40g"), presets.model("7b"), 64, "zero3")
    share = args.per_pack if args.per_pack is not None else (1.0 if args.in_rounds else 0.05)
    return replace(published, per_pack=share * published.per_pack)


def bound(lengths: Sequence[int], args: argparse.Namespace, cost: CostModel) -> float:
    return lower_bound(lengths, args.devices, cost, largest_degree=args.largest_degree, in_rounds=args.in_rounds, method=args.bound)


def title(args: argparse.Namespace, cost: CostModel, batches: list[list[int]]) -> str:
    tokens = mean(sum(lengths) for lengths in batches) / args.devices / cost.tokens_per_rank
    setting = "in rounds" if args.in_rounds else "without rounds"
    size = f"{args.documents} documents on {args.devices} devices, {setting}, {args.batches} batches of {args.lengths}"
    return f"{size}\n{tokens:.2f} times what memory holds at once, {cost.per_pack:.3f} s a pack, bound: {args.bound}"


def measure(policy: str, lengths: Sequence[int], args: argparse.Namespace, cost: CostModel) -> Row:
    """Plan one batch several times; the first time, which may compile, is not counted."""
    kind, _, degree = policy.partition(":")

    def plan() -> Plan:
        return plan_step(
            lengths,
            args.devices,
            cost,
            kind,
            degree=int(degree) if degree else None,
            largest_degree=args.largest_degree,
            in_rounds=args.in_rounds,
        )

    made = plan()
    encoded = made.encode()
    planning, building, encoding = (timed(each, args.repeats) for each in (plan, lambda: Plan.decode(encoded), made.encode))
    return Row(planning, building, encoding, timeline(made, pack_seconds(made, cost)).seconds)


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return seconds


if __name__ == "__main__":
    main()
