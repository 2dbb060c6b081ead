"""Seconds of real training steps by each planning policy on two hosts with a slow cable between them.

    python tools/bench_sequence_parallel.py --rates 100 200 1000 --lengths lengths.npz

Measured, not simulated: four ranks, two on each of two network namespaces, real attention, real gradients and updates, over gloo. Only the
cable is held to a rate. Policies take turns in each repeat, on the same documents; costs are measured first, by the ranks themselves.
Needs root (for the namespaces) and iproute2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from two_hosts import ADDRESSES, two_hosts

from megatron_ext.data.corpus import Piece
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.world import World, join_world
from megatron_ext.planning import CostModel, Plan, plan_step
from megatron_ext.planning.cost_file import cost_to_json
from megatron_ext.planning.cost_model import AttentionShape, Curve
from megatron_ext.planning.lengths import length_distribution
from megatron_ext.planning.timeline import pack_seconds, timeline
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.engine import Engine, owner_engine
from megatron_ext.train.packs import PlannedPacks

RANKS, RANKS_PER_HOST = 4, 2
SETTINGS = {
    "train_batch_size": RANKS,
    "train_micro_batch_size_per_gpu": 1,
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.0,
    "steps_per_print": 2**62,
}


@dataclass(frozen=True)
class RandomTokens:
    """A corpus of random documents of the lengths of one step."""

    vocab_size: int
    seed: int
    path: str = "random"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document."""
        return np.random.default_rng((self.seed, document)).integers(0, self.vocab_size, stop)[start:]


def draw_steps(arguments: argparse.Namespace) -> list[list[int]]:
    """Lengths of the documents of each step; documents that even all ranks cannot hold are left out."""
    rng = np.random.default_rng(arguments.seed)
    if arguments.lengths.endswith(".npz"):
        known = np.load(arguments.lengths, allow_pickle=False)["lengths"]
        drawn = rng.choice(known, 100_000)
    else:
        drawn = length_distribution(arguments.lengths).sample(100_000, rng)
    lengths = iter(drawn[drawn <= RANKS * arguments.tokens_per_rank].tolist())
    steps = []
    for _ in range(arguments.steps):
        step: list[int] = []
        while sum(step) < arguments.tokens_per_step:
            step.append(next(lengths))
        steps.append(step)
    return steps


def measured_curve(group: Group, sizes: tuple[int, int]) -> Curve:
    """Seconds of an all-to-all by bytes that a rank sends to others; the fastest of some rounds."""
    points = []
    for size in sizes:
        part = size // (group.size - 1) // 4
        seconds = []
        for _ in range(3):
            group.all_reduce(torch.zeros(1))
            begin = time.perf_counter()
            group.all_to_all(torch.zeros(part * group.size), [part] * group.size, [part] * group.size)
            seconds.append(float(group.all_reduce(torch.tensor([time.perf_counter() - begin]))) / group.size)
        points.append((float(part * 4 * (group.size - 1)), min(seconds)))
    return Curve(tuple(sent for sent, _ in points), tuple(seconds for _, seconds in points))


def measured_costs(engine: Engine, model: GPT, arguments: argparse.Namespace, world: World) -> CostModel:
    """Costs as all ranks together measure them; the slowest rank counts."""
    grid, config, most = engine.grid, model.config, arguments.tokens_per_rank
    rows, seconds = [], []
    for lengths in ([most], [most // 8] * 8, [most // 2], [64]):
        plan = plan_step(lengths * RANKS, RANKS, CostModel(most), "data_parallel")
        packs = packs_of(engine, plan, lengths * RANKS, config.vocab_size, 0)
        taken = []
        for _ in range(3):
            world.barrier()
            engine.step(packs, 10_000, torch.zeros(0, dtype=torch.float64))
            taken.append(world.gather(engine.pack_seconds))
        rows.append([sum(lengths), sum(length**2 for length in lengths), 1.0])
        seconds.append(min(max(each) for each in taken))
    per_token, squared, per_pack = np.maximum(0.0, np.linalg.lstsq(np.array(rows), np.array(seconds), rcond=None)[0]).tolist()
    curves = []
    for degree in (2, 4):
        block = grid.block(degree)
        assert block is not None, "four ranks make blocks of two and four"
        curves.append(measured_curve(block, (2**14, 2**20)))
    shape = AttentionShape(config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, element_bytes=4)
    cost = CostModel(most, per_token, squared, per_pack=per_pack, attention=shape, all_to_all=tuple(curves))
    # Rank 0's view: all ranks must plan alike.
    shared = world.on_main([per_token, squared, per_pack, [asdict(curve) for curve in curves]])
    agreed = tuple(Curve(tuple(each["bytes"]), tuple(each["seconds"])) for each in shared[3])
    return replace(cost, per_token=shared[0], per_token_squared=shared[1], per_pack=shared[2], all_to_all=agreed)


def packs_of(engine: Engine, plan: Plan, lengths: list[int], vocab_size: int, seed: int) -> PlannedPacks:
    """This rank's packs of a plan."""
    pieces = [Piece(0, number, 0, length, has_next=True) for number, length in enumerate(lengths)]
    return PlannedPacks(engine.packs_of(plan), pieces, [RandomTokens(vocab_size, seed)], vocab_size, engine.grid.dp.rank)


def work(arguments: argparse.Namespace) -> None:
    """What each rank does; rank 0 prints a line of JSON for each repeat of each policy."""
    world = join_world(threads_per_rank=1)
    hidden, heads = arguments.hidden_size, arguments.hidden_size // 32
    config = ModelConfig(arguments.vocab_size, hidden, hidden * 11 // 4, arguments.layers, heads, heads // 2, 32, RANKS * 2**20)
    grid = Grid(world, GridShape(1, RANKS, 1))
    model = GPT(config, "sdpa")
    model.reset_parameters(0)
    engine = owner_engine(model, build_optimizer(model, OptimizerOptions(lr=0.0), grid), grid, SETTINGS, 1)
    cost = measured_costs(engine, model, arguments, world)
    steps = draw_steps(arguments)
    plan = partial(plan_step, devices=RANKS, cost=cost)
    policies = {"adaptive": partial(plan, policy="adaptive"), "best_static": partial(plan, policy="best_static")}
    policies["static: 4"] = partial(plan, policy="static", degree=4)
    if max(map(max, steps)) <= arguments.tokens_per_rank:
        policies["data_parallel"] = partial(plan, policy="data_parallel")
    for repeat in range(arguments.repeats + 1):
        for name, policy in policies.items():
            plans = [policy(lengths) for lengths in steps]
            losses, seconds, exchange = [], 0.0, 0.0
            for seed, (lengths, each) in enumerate(zip(steps, plans, strict=True)):
                packs = packs_of(engine, each, lengths, config.vocab_size, seed)
                world.barrier()
                begin = time.perf_counter()
                result = engine.step(packs, sum(lengths), torch.zeros(0, dtype=torch.float64))
                seconds += time.perf_counter() - begin
                losses.append(result.loss)
                exchange += result.exchange_seconds
            tokens = {d: sum(p.tokens for each in plans for p in each.packs if p.degree == d) for d in (1, 2, 4)}
            if world.is_main and repeat:  # the first repeat warms up
                predicted = sum(timeline(each, pack_seconds(each, cost)).seconds for each in plans)
                line = {"policy": name, "seconds": seconds, "exchange": exchange, "losses": losses, "tokens": tokens}
                print(json.dumps(line | {"predicted": predicted, "cost": cost_to_json(cost)}), flush=True)
    os._exit(0)


def run_on_hosts(megabits: float) -> list[dict[str, object]]:
    """Start this script on every rank of two hosts; returns what rank 0 printed."""
    with two_hosts(megabits) as names:
        processes = []
        for rank in range(RANKS):
            host = rank // RANKS_PER_HOST
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": "2"}
            environment |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            command = ["ip", "netns", "exec", names[host], sys.executable, *sys.argv, "--rank"]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment | {"DS_ACCELERATOR": "cpu"}, stdout=out, text=True))
        said, _ = processes[0].communicate()
        if processes[0].returncode:
            raise SystemExit(f"rank 0 failed at {megabits} Mbit/s with code {processes[0].returncode}")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def print_rate(megabits: float, lines: list[dict[str, object]], arguments: argparse.Namespace) -> None:
    """A table of one rate."""
    names = list(dict.fromkeys(line["policy"] for line in lines))
    seconds = {name: [line["seconds"] for line in lines if line["policy"] == name] for name in names}
    work = f"{arguments.steps} steps of {arguments.tokens_per_step:,} tokens, {arguments.tokens_per_rank:,} a rank"
    title = f"MEASURED at {megabits:g} Mbit/s: {work}"
    table = Table(title=title)
    for heading in ("policy", "seconds", "of adaptive: min", "median", "max", "predicted", "in exchanges", "tokens by degree 1 | 2 | 4"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name in names:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["adaptive"], strict=True))
        first = next(line for line in lines if line["policy"] == name)
        share = statistics.median(line["exchange"] / line["seconds"] for line in lines if line["policy"] == name)
        cells = (f"{each:.2f}" for each in (ratios[0], statistics.median(ratios), ratios[-1]))
        shares = " | ".join(f"{tokens:,}" for tokens in first["tokens"].values())
        table.add_row(name, f"{statistics.median(seconds[name]):.2f}", *cells, f"{first['predicted']:.2f}", f"{share:.0%}", shares)
    Console(width=140).print(table)
    cost = lines[0]["cost"]
    print(f"costs: {cost['per_token']:.2e} s/token, {cost['per_token_squared']:.2e} s/token^2, {cost['per_pack']:.2e} s/pack", end="; ")
    slow = [(curve["seconds"][-1] - curve["seconds"][0]) / (curve["bytes"][-1] - curve["bytes"][0]) for curve in cost["all_to_all"]]
    print(f"all-to-all of 2 and 4 ranks {1e-6 / slow[0]:.0f} and {1e-6 / slow[1]:.0f} MB/s")
    worst = max(abs(a / b - 1) for line in lines for a, b in zip(line["losses"], lines[0]["losses"], strict=True))
    print(f"losses of all policies agree to {worst:.1e}; {len(seconds['adaptive'])} repeats, policies in turn in each\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[200.0], help="of the cable, Mbit/s")
    parser.add_argument("--lengths", default="wikipedia-like", help=".npz file with an array `lengths`, or wikipedia-like, github-like")
    parser.add_argument("--tokens-per-rank", type=int, default=1024, help="token budget of a rank: what fits in memory")
    parser.add_argument("--tokens-per-step", type=int, default=12288)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        work(arguments)
    for megabits in arguments.rates:
        print_rate(megabits, run_on_hosts(megabits), arguments)


if __name__ == "__main__":
    main()
