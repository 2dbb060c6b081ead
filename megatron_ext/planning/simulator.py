"""Plans of many policies for the same steps, judged on the same machines. Every number is SIMULATED except the seconds of planning."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import one_of
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.judge import Truth, Verdict, judge, perturbed
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.presets import Memory
from megatron_ext.planning.timeline import pack_seconds, timeline

Planner = Callable[[Sequence[int]], tuple[Plan, float | None]]
"""Lengths in; a plan, and the seconds of planning that count where the planner would have run on many processors (None: all)."""


@dataclass(frozen=True)
class Machine:
    """What all policies plan for."""

    devices: int
    cost: CostModel
    memory: Memory
    in_rounds: bool

    def truth(self, perturb: float, seed: Sequence[int]) -> Truth:
        """A machine whose coefficients differ from the believed ones by ``perturb``."""
        return Truth(perturbed(self.cost, perturb, seed), self.memory, lock_step=self.in_rounds)


@dataclass(frozen=True)
class Planned:
    """A policy's plan of one batch."""

    policy: str
    plan: Plan | None
    """None where the planner found no plan because a document fits on no block that it may use."""
    refusal: str
    """Why there is no plan; empty where there is one."""
    planning_seconds: float
    """Measured on this machine, on one processor."""
    counted_seconds: float
    """As if on as many processors as the planner can use: what can delay a step."""
    believed_seconds: float
    """Of the step, by the planner's own cost model; infinite without a plan."""


@dataclass(frozen=True)
class Judged:
    """One batch, one policy, one perturbation."""

    batch: int
    perturb: float
    planned: Planned
    verdict: Verdict | None
    """None without a plan."""
    believed_bound: float
    """Lower bound of ``planned.believed_seconds``, over all plans."""
    bound: float
    """Lower bound of ``verdict.seconds``, over all plans: of the judge's minorant."""

    @property
    def fits(self) -> bool:
        """There is a plan and every pack of it fits in memory."""
        return self.verdict is not None and not self.verdict.oom

    @property
    def seconds(self) -> float:
        """Of the step, infinite where it does not fit. Planning runs during the step before: it delays only where it takes longer."""
        return max(self.verdict.seconds, self.planned.counted_seconds) if self.verdict else float("inf")

    @property
    def delayed(self) -> bool:
        """Planning took longer than the step."""
        return self.fits and self.seconds > self.verdict.seconds


@dataclass(frozen=True)
class Ratio:
    """Mean of paired ratios with a 95 % bootstrap confidence interval; NaN without pairs."""

    mean: float
    low: float
    high: float
    pairs: int


@dataclass
class Simulation:
    """Batches and policies on one machine."""

    machine: Machine
    planners: dict[str, Planner]
    bound: Callable[[Sequence[int], CostModel], float]
    perturbs: Sequence[float] = (0.0,)
    seed: int = 0
    results: list[Judged] = field(default_factory=list)

    def run(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, Planned]]:
        """Plan and judge; yields after every plan, with the number of its batch. Results are in ``results``.

        Raises:
            ConfigError: a policy that cannot even plan a step of one token.
        """
        for planner in self.planners.values():
            planner([1])  # Compiles what is compiled at first use, too.
        for number, lengths in enumerate(batches):
            truths = [self.machine.truth(amount, (self.seed, number)) for amount in self.perturbs]
            bounds = [self.bound(lengths, truth.minorant) for truth in truths]
            believed_bound = self.bound(lengths, self.machine.cost)
            for policy, planner in self.planners.items():
                planned = self.plan(policy, planner, lengths)
                for amount, truth, bound in zip(self.perturbs, truths, bounds, strict=True):
                    verdict = judge(planned.plan, lengths, truth) if planned.plan else None
                    self.results.append(Judged(number, amount, planned, verdict, believed_bound, bound))
                yield number, planned

    def plan(self, policy: str, planner: Planner, lengths: Sequence[int]) -> Planned:
        """One plan and the seconds it took."""
        begin = time.perf_counter()
        try:
            plan, counted = planner(lengths)
        except ConfigError as error:
            return Planned(policy, None, str(error), time.perf_counter() - begin, 0.0, float("inf"))
        seconds = time.perf_counter() - begin
        believed = timeline(plan, pack_seconds(plan, self.machine.cost), self.machine.cost.per_step).seconds
        return Planned(policy, plan, "", seconds, seconds if counted is None else counted, believed)

    def of(self, policy: str, perturb: float) -> list[Judged]:
        """Results of a policy, by batch."""
        return [each for each in self.results if each.planned.policy == policy and each.perturb == perturb]

    def beside(self, policy: str, reference: str, perturb: float, charged: bool = True) -> Ratio:
        """Seconds of a policy over those of another, on the batches where the plans of both fit in memory.

        Args:
            policy: above.
            reference: below.
            perturb: of the truth.
            charged: with planning where it takes longer than a step; otherwise planning is free.
        """
        pairs = zip(self.of(policy, perturb), self.of(reference, perturb), strict=True)
        fitting = [(mine, other) for mine, other in pairs if mine.fits and other.fits]
        if charged:
            return paired([mine.seconds / other.seconds for mine, other in fitting], self.seed)
        return paired(
            [mine.verdict.seconds / other.verdict.seconds for mine, other in fitting if mine.verdict and other.verdict], self.seed
        )

    def above_bound(self, policy: str, perturb: float) -> Ratio:
        """Judged seconds over the bound of the judge's minorant."""
        return paired([each.seconds / each.bound for each in self.of(policy, perturb) if each.fits], self.seed)

    def above_believed_bound(self, policy: str, perturb: float) -> Ratio:
        """Seconds by the planner's model over its bound; the planning that may delay a step is not in it."""
        found = [each for each in self.of(policy, perturb) if each.planned.plan]
        return paired([each.planned.believed_seconds / each.believed_bound for each in found], self.seed)


def paired(ratios: Sequence[float], seed: int, resamples: int = 2000) -> Ratio:
    """Mean and the percentile bootstrap (Efron 1979) of batches."""
    if not len(ratios):
        return Ratio(float("nan"), float("nan"), float("nan"), 0)
    values = np.array(ratios)
    means = np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Ratio(float(values.mean()), float(low), float(high), len(values))


def draw_batches(
    population: NDArray[np.integer], documents: int, batches: int, longest: int, rng: np.random.Generator
) -> tuple[list[list[int]], float]:
    """Batches of documents no longer than ``longest``, and the share of the documents that is longer and left out.

    Raises:
        ConfigError: all documents are longer.
    """
    kept = population[population <= longest]
    if not len(kept):
        raise ConfigError(f"longest: {longest}; accepted: at least {population.min()}, the shortest document")
    return [rng.choice(kept, documents).tolist() for _ in range(batches)], 1.0 - len(kept) / len(population)


def planner_of(name: str, machine: Machine, milp_seconds: float = 5.0, milp_tries: int = 2) -> Planner:
    """The planner that a name on the command line stands for; ``static:64`` and ``wlb:8`` give a degree.

    Raises:
        ConfigError: naming the planners.
    """
    from megatron_ext.planning.peers.bytescale import bytescale
    from megatron_ext.planning.peers.flexsp import flexsp
    from megatron_ext.planning.peers.megatron_dcp import megatron_dcp
    from megatron_ext.planning.peers.wlb import wlb
    from megatron_ext.planning.policies import plan_step

    kind, _, number = name.partition(":")
    known = ["adaptive", "best_static", "static", "data_parallel", "flexsp", "megatron_dcp", "bytescale", "wlb"]
    if kind not in known or (number and kind not in ("static", "wlb")) or (number and not number.isdecimal()) or name == "static":
        raise ConfigError(f"policies: {name!r}; accepted: {one_of(known, kind)}; static:DEGREE, wlb:DEGREE")
    degree = int(number) if number else None
    devices, cost, in_rounds = machine.devices, machine.cost, machine.in_rounds

    def plan(lengths: Sequence[int]) -> tuple[Plan, float | None]:
        match kind:
            case "flexsp":
                found = flexsp(lengths, devices, cost, time_limit=milp_seconds, tries=milp_tries, in_rounds=in_rounds)
                return found.plan, found.parallel_seconds
            case "megatron_dcp":
                return megatron_dcp(lengths, devices, cost, in_rounds=in_rounds), None
            case "bytescale":
                return bytescale(lengths, devices, cost, in_rounds=in_rounds), None
            case "wlb":
                return wlb(lengths, devices, cost, degree=degree, in_rounds=in_rounds), None
        given = {} if degree is None else {"degree": degree}
        return plan_step(lengths, devices, cost, kind, in_rounds=in_rounds, **given), None

    return plan
