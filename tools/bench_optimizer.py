"""One step from gradients to new parameters on all ranks: the owner optimizer beside DeepSpeed's ZeRO-1 and plain data parallelism.

    python tools/bench_optimizer.py --ranks 2 --parameters 30000000

  megatron_ext   gradients reduced to owners, AdamW there, new values sent back; with and without overlap with backward
  zero1-torch    DeepSpeed ZeRO-1 with torch's fused AdamW
  zero1-cpu      DeepSpeed ZeRO-1 with its own vectorized Adam for CPUs (compiled when it is first used)
  all-reduce     gradients all-reduced, torch's fused AdamW on every rank

All clip by the global norm and begin with the same backward of almost no arithmetic, so that what is timed is the optimizer's work.
"""

import argparse
import time
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from bench_ranks import Ranks, State, print_ratios
from rich.progress import track
from torch import nn

from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.rules import Rule
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.placement import Placement, whole_box
from megatron_ext.parallel.world import World
from megatron_ext.train.deepspeed_setup import join_deepspeed

WAYS = ("megatron_ext", "no-overlap", "zero1-torch", "zero1-cpu", "all-reduce")
CLIP = 1.0


class Parameters(nn.Module):
    """Square matrices whose backward costs nothing beside what is measured."""

    def __init__(self, elements: int, width: int = 1024) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        count = max(1, elements // width**2)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(width, width, generator=generator)) for _ in range(count)])

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        """A scalar whose gradient for every weight is ``factor`` times the same constant."""
        return torch.stack([weight.mean() for weight in self.weights]).sum() * factor


def owner_step(model: Parameters, world: World, overlap: bool) -> Callable[[torch.Tensor], None]:
    named = dict(model.named_parameters())
    placements = {name: Placement(p.shape, whole_box(p.shape), (world.rank,), False) for name, p in named.items()}

    def rule(owned: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        return AdamW([tensor for _, tensor in owned], lr=1e-3)

    rules = dict.fromkeys(named, Rule("adamw", rule))
    optimizer = ShardedOptimizer(named, placements, rules, Grid(world, GridShape(1, world.size, 1)), CLIP, overlap)

    def step(factor: torch.Tensor) -> None:
        optimizer.expect_backwards(1)
        model(factor).backward()
        optimizer.step()

    return step


def zero_step(model: Parameters, world: World, name: str) -> Callable[[torch.Tensor], None]:
    join_deepspeed(world)
    if name == "zero1-cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        rule = DeepSpeedCPUAdam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        rule = AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": CLIP,
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=rule, config=config, dist_init_required=False)

    def step(factor: torch.Tensor) -> None:
        engine.backward(engine(factor))
        engine.step()

    return step


def all_reduce_step(model: Parameters, world: World) -> Callable[[torch.Tensor], None]:
    rule = AdamW(model.parameters(), lr=1e-3)

    def step(factor: torch.Tensor) -> None:
        model(factor).backward()
        works = [dist.all_reduce(parameter.grad, async_op=True) for parameter in model.parameters()]
        for work in works:
            work.wait()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rule.step()
        rule.zero_grad()

    return step


def set_up(world: World, state: State, name: str, elements: int) -> float:
    """Make a way's step and take it once; returns a number that all ways must agree on."""
    model = Parameters(elements)
    if name in ("megatron_ext", "no-overlap"):
        state["step"] = owner_step(model, world, overlap=name == "megatron_ext")
    elif name == "all-reduce":
        state["step"] = all_reduce_step(model, world)
    else:
        state["step"] = zero_step(model, world, name)
    # ZeRO averages over the ranks what the others sum.
    state["factor"] = torch.tensor(1e3 * (world.size if name.startswith("zero1") else 1))
    state["step"](state["factor"])
    return float(sum(parameter.detach().double().square().sum() for parameter in model.parameters()))


def timed(world: World, state: State) -> float:
    """Seconds of a step."""
    world.barrier()
    begin = time.perf_counter()
    state["step"](state["factor"])
    world.barrier()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=30_000_000, help="float32 values")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    ways = {name: Ranks(arguments.ranks) for name in arguments.ways}
    for name, ranks in ways.items():
        print(f"{name}: sum of squares after a step {ranks.run(set_up, name, arguments.parameters)[0]:.6f}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(arguments.rounds), description="rounds"):
        for name, ranks in ways.items():
            seconds[name].append(max(ranks.run(timed)))
    for ranks in ways.values():
        ranks.close()
    title = f"{arguments.parameters:,} parameters on {arguments.ranks} ranks of one thread"
    print_ratios(title, "way", arguments.ways[0], seconds, "seconds", "less")


if __name__ == "__main__":
    main()
