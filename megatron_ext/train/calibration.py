"""The coefficients of a run's cost model, measured on the ranks that will train."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_ext.data.batch import PackedBatch
from megatron_ext.data.corpus import Piece
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.parallel.grid import Grid
from megatron_ext.planning import CostModel, Pack, Plan, Slice
from megatron_ext.planning.cost_model import Array
from megatron_ext.train.build import Setup, build_engine, build_model
from megatron_ext.train.calibration_fit import Fit, attention_efficiency, curve_of, fit_compute
from megatron_ext.train.calibration_probes import (
    Probe,
    measure,
    probe_all_to_all,
    probe_attention,
    probe_packs,
    probe_ring_step,
    probe_step,
)
from megatron_ext.train.costs import attention_shape
from megatron_ext.train.engine import Engine
from megatron_ext.train.packs import PlannedPacks

LEAST_BYTES = 1024
"""Of an exchange that is measured; the next have four times as many."""
LEAST_TOKENS = 16
"""Of a document that is measured, where packs have room for longer ones."""
DRAWN_PACKS = 3
"""Packs of random documents that predictions are compared with."""


@dataclass(frozen=True)
class Check:
    """What the fitted model predicts of a pack that it was not fitted to, and what was measured; seconds."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True)
class Calibration:
    """What was measured, the same on all ranks."""

    cost: CostModel
    fit: Fit
    checks: tuple[Check, ...]
    chosen: dict[str, str]
    """As of ``build_model``."""


@dataclass(frozen=True)
class Trial:
    """A pack that is timed, on every rank or block of ranks at once: lengths of its documents in tokens."""

    lengths: tuple[int, ...]
    degree: int = 1


@dataclass(frozen=True)
class RandomText:
    """Documents of random tokens, read like a corpus."""

    vocab_size: int
    path: str = "random text"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens of a document."""
        return np.random.default_rng((document, start)).integers(0, self.vocab_size, stop - start)


def calibrate(setup: Setup, grid: Grid, rounds: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Calibration:
    """Measure the cost model of a run on its grid. All ranks call it.

    Args:
        setup: of the run.
        grid: its ranks.
        rounds: of which the median counts.
        progress: called after each measurement with how many are done and how many there are.
    """
    model, chosen = build_model(setup, grid)
    engine = build_engine(setup, model, grid)
    engine.optimizer.set_learning_rate_factor(0.0)
    like = torch.empty(0, dtype=next(model.parameters()).dtype, device=grid.world.device)
    backend, _ = select_backend(setup.config.model.attention, like.device, like.dtype, setup.model.head_dim)
    cost = CostModel(setup.tokens_per_pack, attention=attention_shape(setup, grid.shape, like.dtype))
    designed, others = designed_trials(cost.tokens_per_rank), _other_trials(setup, cost, grid.shape.dp)
    batches = _batches([*designed, *others], cost, engine, setup.model.vocab_size)
    lengths = halves(cost.tokens_per_rank, LEAST_TOKENS)[::-1]
    exchanges, sizes = _exchanges(cost, grid, like)
    probes = [
        probe_packs(engine, model, batches),
        probe_step(engine, batches[-1]),
        probe_attention(cost.attention, lengths, cost.tokens_per_rank, backend, like),
        *exchanges,
    ]
    packs, step, attention, *exchanged = measure(probes, rounds, grid.world, progress)
    engine.close()
    tokens, rates = attention_efficiency(lengths, attention)
    curves = tuple(map(curve_of, sizes, exchanged))
    cost = replace(cost, efficiency_tokens=tokens, efficiency=rates, per_step=float(step[0]), all_to_all=curves[:-1])
    cost = replace(cost, ring_step=curves[-1]) if curves else cost
    cost, fit = fit_compute(cost, [trial.lengths for trial in designed], packs[: len(designed)])
    return Calibration(cost, fit, _checks(cost, others, packs[len(designed) :]), chosen)


def designed_trials(tokens: int) -> list[Trial]:
    """What coefficients are fitted to: of up to ``tokens`` tokens, one document of any length, and many short ones."""
    least = max(1, min(LEAST_TOKENS, tokens // 8))
    alone = [(length,) for length in halves(tokens, least)[:7]]
    short = [length for length in (tokens // 4, tokens // 16, tokens // 64, tokens // 256) if length >= least]
    filled = [(length,) * (tokens // length) for length in short]
    small = [(length,) * 4 for length in short[1:3]]
    mixed = [(tokens // 2, *(length,) * (tokens // 2 // length)) for length in short[1:2]]
    return [Trial(lengths) for lengths in (*alone, *filled, *small, *mixed)]


def _other_trials(setup: Setup, cost: CostModel, ranks: int) -> list[Trial]:
    """What predictions are compared with: random documents on each rank, and on the largest blocks that the run may share packs in."""
    draw = np.random.default_rng(0)
    longest = setup.config.data.longest_sequence
    trials = [Trial(random_lengths(draw, cost.tokens_per_rank, longest)) for _ in range(DRAWN_PACKS)]
    degree = cost.degrees(ranks, setup.config.planning.largest_degree)[-1]
    first = min(longest, cost.capacity(degree))
    shared = Trial((first, *random_lengths(draw, cost.capacity(degree) - first, longest)), degree)
    return [*trials, shared] if degree > 1 else trials


def random_lengths(draw: np.random.Generator, tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths of documents of up to ``longest`` tokens, log-uniform, that fill ``tokens``."""
    lengths = []
    while tokens:
        lengths.append(min(tokens, int(np.exp(draw.uniform(0.0, np.log(longest + 1))))))
        tokens -= lengths[-1]
    return tuple(lengths)


def halves(most: int, least: int) -> list[int]:
    """``most``, half of it, and so on, down to ``least``."""
    return [most] + [most >> power for power in range(1, most.bit_length()) if most >> power >= least]


def _batches(trials: Sequence[Trial], cost: CostModel, engine: Engine, vocab_size: int) -> list[PackedBatch]:
    """This rank's part of each trial, and at last a pack of no tokens; all ranks have as many."""
    ranks = engine.grid.shape.dp
    pieces: list[Piece] = []
    packs: list[Pack] = []
    for trial in trials:
        slices = tuple(Slice(len(pieces) + number, 0, length) for number, length in enumerate(trial.lengths))
        pieces += [Piece(0, part.document, 0, len(part), has_next=True) for part in slices]
        blocks = range(0, ranks - trial.degree + 1, trial.degree)
        packs += [Pack(first, trial.degree, slices, cost.ring_of(trial.degree)) for first in blocks]
    packs += [Pack(rank, 1, ()) for rank in range(ranks)]
    mine = engine.packs_of(Plan(ranks, tuple(packs)).by_rounds())
    return list(PlannedPacks(mine, pieces, [RandomText(vocab_size)], vocab_size, engine.grid.dp.rank))


def _exchanges(cost: CostModel, grid: Grid, like: torch.Tensor) -> tuple[list[Probe], list[list[int]]]:
    """All-to-alls of 2, 4 ... ranks, as far as heads can be divided, then steps of the largest ring; and their bytes. None on one rank.

    The ring is that of the largest block. Where heads can be divided over all of it, it needs none, and all its ranks are taken.
    """
    ranks, element = grid.shape.dp, like.element_size()
    if ranks == 1:
        return [], []
    probes, sizes = [], []
    for degree in cost.degrees(ranks)[1:]:
        most = max(float(sent) for sent in cost.all_to_all_bytes(cost.capacity(degree), degree))
        sizes.append(byte_sizes(most, (degree - 1) * element))
        probes.append(probe_all_to_all(grid.block(degree), sizes[-1], like))
    degree = 1 << (ranks.bit_length() - 1)
    ring = cost.ring_of(degree)
    most = max(float(sent) for sent in cost.ring_step_bytes(cost.capacity(degree if ring > 1 else 1), degree if ring > 1 else 1))
    sizes.append(byte_sizes(most, element))
    probes.append(probe_ring_step(grid.ring(degree, ring if ring > 1 else degree), sizes[-1], like))
    return probes, sizes


def byte_sizes(most: float, unit: int) -> list[int]:
    """Ascending multiples of ``unit`` bytes, of 1 KiB to ``most``."""
    powers = [LEAST_BYTES * 4**power for power in range(32) if LEAST_BYTES * 4**power < most]
    return sorted({unit * max(1, round(size / unit)) for size in (*powers, most)})


def _checks(cost: CostModel, trials: Sequence[Trial], measured: Array) -> tuple[Check, ...]:
    checks = []
    for number, (trial, seconds) in enumerate(zip(trials, measured.tolist(), strict=True)):
        where = f"shared by {trial.degree} ranks" if trial.degree > 1 else f"{number + 1} on each rank"
        name = f"random pack {where}: {sum(trial.lengths):,} tokens, documents of up to {max(trial.lengths):,}"
        work = float(cost.work(np.array(trial.lengths)).sum())
        checks.append(Check(name, float(cost.pack_seconds(work, sum(trial.lengths), trial.degree)), seconds))
    return tuple(checks)
