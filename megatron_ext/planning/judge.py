"""What a plan would take on a machine that is less simple than planners believe. Every number is SIMULATED.

A planner sees a ``CostModel``. The judge adds what makes plans slower in practice, each a number of ``Overheads``: attention kernels work
in tiles and are slow for short documents; exchanges begin with a latency that grows with the block; tokens and heads that ranks do not
divide evenly are paced by the rank with most; ranks that gather parameters meet in every layer, forward and backward; a rank that changes
its block has to set up. All are additions, so ``Truth.minorant`` is a model in which no plan takes longer than the judge says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import Array, CostModel, Curve
from megatron_ext.planning.plan import Pack, Plan
from megatron_ext.planning.presets import Memory
from megatron_ext.planning.timeline import Timeline, timeline

ANY_TOKENS = 2**40


@dataclass(frozen=True)
class Overheads:
    """What the planner's model leaves out. The defaults are assumed, of the order that is reported for GPU clusters."""

    tile: int = 128
    """Tokens of a document that an attention kernel computes at once; a document is rounded up to whole tiles."""
    half_rate_tokens: int = 256
    """Length of a document at which the attention kernel reaches half of its full rate."""
    launch: float = 20e-6
    """Seconds until an exchange begins."""
    message: float = 4e-6
    """Seconds more for every other rank of the block."""
    layer_sync: float = 100e-6
    """Seconds in which ranks that gather parameters meet, every time that they go through a layer."""
    switch: float = 5e-3
    """Seconds of a pack of which a rank computed with another block before."""


@dataclass(frozen=True)
class Truth:
    """The machine that plans are judged on."""

    cost: CostModel
    """True coefficients, of the planner's kind. Efficiencies in it are not read: the judge has its own."""
    memory: Memory
    overheads: Overheads = field(default_factory=Overheads)
    lock_step: bool = True
    """Ranks meet in every layer (ZeRO-2/3, pipelines): plans must be in rounds."""

    @property
    def minorant(self) -> CostModel:
        """A cost model in which no plan that fits in memory takes longer than it is judged to: the true coefficients alone.

        ``lower_bound`` of it is a lower bound of the judge's seconds.
        """
        return replace(self.cost, efficiency_tokens=(), efficiency=(), tokens_per_rank=self.memory.tokens_per_rank)


@dataclass(frozen=True)
class Verdict:
    """A judged plan. All seconds are SIMULATED."""

    seconds: float
    """Of the step; infinite where a pack does not fit in memory."""
    oom: tuple[int, ...]
    """Numbers of the packs that do not fit."""
    peak_bytes: float
    """Of the rank that needs most."""
    timeline: Timeline
    """As if everything fitted."""
    idle: float
    """Share of the ranks' seconds in which they compute and exchange nothing."""
    exchange: float
    """Share of the ranks' seconds in exchanges."""
    switches: int
    """Packs of which a rank computed with another block before."""


@dataclass(frozen=True)
class Parts:
    """Seconds of packs, by what they are spent on. Arrays of one value a pack."""

    fixed: Array
    linear: Array
    attention: Array
    exchange: Array

    @property
    def total(self) -> Array:
        """Seconds of the packs."""
        return self.fixed + self.linear + self.attention + self.exchange

    def forward(self, forwards: int) -> Array:
        """Seconds of the packs in their ``forwards`` forward passes.

        A backward pass is two forward passes of matrix products, 2.5 of attention (Dao 2023, arXiv:2307.08691, section 4.1), and as many
        exchanges.
        """
        linear = (self.fixed + self.linear) * forwards / (forwards + 2.0)
        return linear + self.attention * forwards / (forwards + 2.5) + self.exchange * forwards / (forwards + 1.0)


def judge(plan: Plan, lengths: Sequence[int], truth: Truth) -> Verdict:
    """Simulate a step.

    Args:
        plan: of the step.
        lengths: tokens of each document.
        truth: the machine.

    Raises:
        ConfigError: the plan does not compute every token once; it is not in rounds where the machine needs it; a ring other than the
            machine's.
    """
    if truth.lock_step and not plan.in_rounds:
        raise ConfigError("plan.in_rounds: false; accepted: true, where ranks gather parameters or are stages of a pipeline")
    plan.validate(lengths, ANY_TOKENS)
    switched = switches(plan)
    parts = pack_parts(plan, truth, switched)
    if truth.lock_step:
        shape = truth.cost.attention
        forward = parts.forward(shape.forwards)
        meet = truth.overheads.layer_sync * shape.layers * (shape.forwards + 1)
        times = lock_step(plan, forward, parts.total - forward, meet, truth.cost.per_step)
    else:
        times = timeline(plan, parts.total, truth.cost.per_step)
    degrees = np.array([pack.degree for pack in plan.packs])
    most = [-(-pack.tokens // pack.degree) for pack in plan.packs]
    peaks = [truth.memory.peak(tokens) for tokens in most]
    # Relative, because planners hold the limit as a whole number of tokens.
    oom = tuple(number for number, peak in enumerate(peaks) if peak > truth.memory.limit * (1 + 1e-12))
    all_seconds = max(times.seconds, np.finfo(float).tiny) * plan.num_ranks
    return Verdict(
        seconds=float("inf") if oom else times.seconds,
        oom=oom,
        peak_bytes=max(peaks, default=truth.memory.states),
        timeline=times,
        idle=1.0 - (float(degrees @ parts.total) + truth.cost.per_step * plan.num_ranks) / all_seconds if plan.packs else 0.0,
        exchange=float(degrees @ parts.exchange) / all_seconds if plan.packs else 0.0,
        switches=int(switched.sum()),
    )


def pack_parts(plan: Plan, truth: Truth, switched: Array) -> Parts:
    """Seconds of each pack alone. Packs of no tokens take none."""
    cost, overheads = truth.cost, truth.overheads
    parts = np.zeros((4, len(plan.packs)))
    for number, pack in enumerate(plan.packs):
        if not pack.tokens:
            continue
        if pack.ring != cost.ring_of(pack.degree):
            raise ConfigError(f"pack {number}: a ring of {pack.ring}; accepted: {cost.ring_of(pack.degree)} for {pack.degree} ranks")
        most = -(-pack.tokens // pack.degree)
        heads = heads_of_the_fullest(cost, pack)
        parts[0, number] = cost.per_pack + overheads.switch * switched[number]
        parts[1, number] = cost.per_token * most
        parts[2, number] = cost.per_token_squared * attention_area(pack, overheads) / pack.degree * heads
        parts[3, number] = float(cost.exchange_seconds(most * pack.degree, pack.degree)) * heads + latency(cost, pack.degree, overheads)
    return Parts(*parts)


def attention_area(pack: Pack, overheads: Overheads) -> float:
    """Squared tokens that attention costs: tiles of queries, each as long as all tokens up to its end, and more for short documents."""
    begin = np.array([part.start for part in pack.slices], dtype=np.float64)
    length = np.array([len(part) for part in pack.slices], dtype=np.float64)
    length = np.ceil(length / overheads.tile) * overheads.tile
    return float((length * (2 * begin + length + overheads.half_rate_tokens)).sum())


def heads_of_the_fullest(cost: CostModel, pack: Pack) -> float:
    """Heads of the rank with most of them, relative to an even division."""
    heads, neighbours = cost.attention.query_heads, pack.degree // pack.ring
    return -(-heads // neighbours) * neighbours / heads


def latency(cost: CostModel, degree: int, overheads: Overheads) -> float:
    """Seconds of a pack until its exchanges begin: two all-to-alls a layer and pass, and the steps of a ring."""
    if degree == 1:
        return 0.0
    ring, passes = cost.ring_of(degree), cost.attention.layers * (cost.attention.forwards + 1)
    neighbours = degree // ring
    all_to_alls = 2 * (overheads.launch + overheads.message * (neighbours - 1)) if neighbours > 1 else 0.0
    return passes * (all_to_alls + (ring - 1) * (overheads.launch + overheads.message))


def switches(plan: Plan) -> Array:
    """1 for each pack of which a rank computed its pack before with another block, else 0."""
    block = np.full((plan.num_ranks, 2), -1)
    switched = np.zeros(len(plan.packs))
    for number, pack in enumerate(plan.packs):
        if pack.tokens:
            before = block[pack.first_rank : pack.first_rank + pack.degree]
            here = np.array([pack.first_rank, pack.degree])
            switched[number] = bool(((before != here).any(axis=1) & (before[:, 1] > 0)).any())
            before[:] = here
    return switched


def lock_step(plan: Plan, forward: Array, backward: Array, meet: float, per_step: float) -> Timeline:
    """Times of a plan in rounds whose ranks meet in every layer: forward is as slow as the slowest forward, and so is backward.

    Layers are alike, so that meeting in each of them is meeting at the end, and ``meet`` seconds a round.
    """
    begin, end = np.zeros(len(plan.packs)), np.zeros(len(plan.packs))
    clock, ranks, slowest = 0.0, 0, np.zeros(2)
    for number, pack in enumerate(plan.packs):
        begin[number] = clock
        end[number] = clock + forward[number] + backward[number]
        slowest = np.maximum(slowest, (forward[number], backward[number]))
        ranks += pack.degree
        if ranks % plan.num_ranks == 0:
            clock += float(slowest.sum()) + meet
            slowest = np.zeros(2)
    return Timeline(begin, end, clock + per_step)


def perturbed(cost: CostModel, amount: float, seed: int | Sequence[int]) -> CostModel:
    """What is true where a planner believes ``cost``: every coefficient of time larger or smaller by a share ``amount``, at random.

    The seconds a token, a squared token and a pack, and the seconds of all-to-alls of every block size err each for itself.

    Args:
        cost: believed.
        amount: in [0, 1).
        seed: for numpy's default generator.

    Raises:
        ConfigError: ``amount`` is out of range.
    """
    if not 0 <= amount < 1:
        raise ConfigError(f"perturb: {amount}; accepted: at least 0 and below 1")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=4 + len(cost.all_to_all))
    token, squared, pack, ring, *links = (1.0 + amount * signs).tolist()
    return replace(
        cost,
        per_token=cost.per_token * token,
        per_token_squared=cost.per_token_squared * squared,
        per_pack=cost.per_pack * pack,
        all_to_all=tuple(slower(curve, factor) for curve, factor in zip(cost.all_to_all, links, strict=True)),
        ring_step=slower(cost.ring_step, ring),
    )


def slower(curve: Curve, factor: float) -> Curve:
    """A curve of ``factor`` times the seconds."""
    return Curve(curve.bytes, tuple(seconds * factor for seconds in curve.seconds))
