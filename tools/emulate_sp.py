"""Wall-clock seconds of planning policies on EMULATED ranks: real processes, planner, broadcast and groups; compute and links sleep.

    python tools/emulate_sp.py --ranks 16 --policies adaptive best_static static:16 --steps 6

Every rank is a process of a gloo group that plans ahead, receives each plan by broadcast, makes the groups that it needs, meets the other
ranks of a block at the begin and the end of each of its packs, and sleeps as long as the cost model says that computing and exchanging
take. Sleep needs no core, so that stragglers, late plans and waiting show as they would; the durations are not measured on any hardware.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from bench_ranks import Ranks, State, print_ratios
from rich.progress import track

from megatron_ext.data.corpus import Piece
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.world import World
from megatron_ext.planning import presets
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.lengths import length_distribution
from megatron_ext.planning.timeline import pack_seconds
from megatron_ext.planning.worker import PlanSettings
from megatron_ext.train.step_plans import StepPlanner


@dataclass
class RandomSteps:
    """Stands in for a mixture: every step has as many documents, of lengths from a distribution or a file."""

    lengths: np.ndarray
    documents: int
    longest: int
    step: int = 0
    path: str = "random"

    def copy(self) -> "RandomSteps":
        """Goes on from here by itself."""
        return replace(self)

    def take(self, most_tokens: int) -> list[Piece]:
        """The documents of the next step, whatever their tokens."""
        rng = np.random.default_rng(self.step)
        self.step += 1
        drawn = np.minimum(rng.choice(self.lengths, self.documents), self.longest)
        return [Piece(0, number, 0, int(length), has_next=True) for number, length in enumerate(drawn)]


def set_up(world: World, state: State, policy: str, steps: RandomSteps, cost: CostModel, ahead: int) -> None:
    """Make the grid and the planner of one policy."""
    name, _, degree = policy.partition(":")
    grid = Grid(world, GridShape(1, world.size, 1))
    settings = PlanSettings(world.size, name, int(degree) if degree else None)
    state.update(grid=grid, steps=steps.copy(), planner=StepPlanner(settings, cost, grid, steps, 0, ahead))


def step(world: World, state: State) -> tuple[float, float]:
    """One step in which computing and exchanging are sleeps; its seconds, and how long rank 0 waited for the plan."""
    grid, planner, steps = state["grid"], state["planner"], state["steps"]
    begin = time.perf_counter()
    planned = planner.next_step(steps.take(0), [steps])
    for degree in sorted({pack.degree for pack in planned.plan.packs}):
        grid.block(degree)
    seconds = pack_seconds(planned.plan, planner.cost)
    meeting = torch.zeros(1)
    for number, pack in enumerate(planned.plan.packs):
        if world.rank in pack.ranks:
            block = grid.block(pack.degree)
            assert block is not None, "plans are made of whole blocks"
            block.all_reduce(meeting)
            time.sleep(seconds[number])
            block.all_reduce(meeting)
    world.barrier()
    return time.perf_counter() - begin, planned.stall_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=["adaptive", "best_static", "static:16"], metavar="POLICY")
    parser.add_argument("--lengths", default="wikipedia-like", help=".npz file with an array `lengths`, or wikipedia-like, github-like")
    parser.add_argument("--documents", type=int, default=256, help="of a step")
    parser.add_argument("--hardware", default="a100_40g")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--speed", type=float, default=10.0, help="how many times faster than the hardware the sleeps are")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ahead", type=int, default=2)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    from_file = arguments.lengths.endswith(".npz")
    known = np.load(arguments.lengths, allow_pickle=False)["lengths"] if from_file else None
    lengths = known if known is not None else length_distribution(arguments.lengths).sample(100_000, rng)
    cost = presets.cost_model(presets.hardware(arguments.hardware), presets.model(arguments.model), arguments.ranks, "zero3")
    cost = replace(cost.scaled(1 / arguments.speed, 1 / arguments.speed), per_step=0.0)
    steps = RandomSteps(lengths, arguments.documents, cost.capacity(cost.degrees(arguments.ranks)[-1]))
    seconds: dict[str, list[float]] = {policy: [] for policy in arguments.policies}
    for policy in arguments.policies:
        ranks = Ranks(arguments.ranks)
        ranks.run(set_up, policy, steps, cost, arguments.ahead)
        ranks.run(step)  # makes groups
        stalls = []
        for _ in track(range(arguments.steps), description=policy):
            results = ranks.run(step)
            seconds[policy].append(max(taken for taken, _ in results))
            stalls.append(results[0][1])
        ranks.close()
        print(f"{policy}: waited {sum(stalls) / len(stalls) * 1e3:.1f} ms a step for plans")
    slept = f"sleeps of {arguments.hardware} {arguments.model} / {arguments.speed:g}"
    title = f"EMULATED: {arguments.ranks} ranks, {arguments.documents} documents, {slept}"
    print_ratios(title, "policy", arguments.policies[0], seconds, "s/step", "less", "the same steps for each policy")


if __name__ == "__main__":
    main()
