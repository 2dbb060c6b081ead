"""Retrieval of needles at lengths and depths, by all ranks together, on whatever grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from megatron_ext.config.run_options import NeedleOptions
from megatron_ext.data.batch import PackedBatch
from megatron_ext.data.needle import Haystack, Needle, needle_pieces
from megatron_ext.data.validation import ValidationSet
from megatron_ext.errors import ConfigError
from megatron_ext.model.gpt import GPT
from megatron_ext.train.engine import Engine
from megatron_ext.train.packs import ChangedPacks, PlannedPacks
from megatron_ext.train.scores import ScoreSums
from megatron_ext.train.step_plans import StepPlanner


@dataclass(frozen=True)
class NeedleResult:
    """What of the needles was found, by length (rows) and depth (columns)."""

    lengths: list[int]
    depths: list[float]
    samples: int
    """Of each length and depth."""
    exact: list[list[float]]
    """Share of samples whose value has only tokens that are the likeliest after what stands before them, the value's own included."""
    log_probability: list[list[float]]
    """Mean over the tokens of all values, in nats."""

    @property
    def mean_exact(self) -> list[float]:
        """Of each length, the mean over depths."""
        return [sum(row) / len(row) for row in self.exact]


def build_haystack(options: NeedleOptions | None, sets: Sequence[ValidationSet]) -> Haystack | None:
    """The text of a run's needles; None where there are no options.

    Raises:
        ConfigError: there is no validation set.
        DataError: the sets have too few distinct tokens.
    """
    if options is None:
        return None
    if not sets:
        raise ConfigError("evaluation.needle needs text to hide needles in; accepted with data.validation or data.validation_fraction")
    haystack = Haystack.of(sets)
    haystack.check(options.key_tokens + options.value_tokens)
    return haystack


class NeedleEvaluation:
    """The same needles at every step of every run with the same validation sets. All ranks make one.

    Args:
        options: which needles.
        haystack: the text around them.
        model: this rank's part.
        engine: of the model.
        planner: plans which rank reads what.

    Raises:
        ConfigError: a needle is longer than what a block of ranks computes.
    """

    def __init__(self, options: NeedleOptions, haystack: Haystack, model: GPT, engine: Engine, planner: StepPlanner) -> None:
        most = planner.settings.longest_document(planner.cost)
        if max(options.lengths) - 1 > most:
            raise ConfigError(
                f"evaluation.needle.lengths has {max(options.lengths)}; accepted: at most {most + 1}, which is what the largest block of "
                "ranks holds by planning.tokens_per_pack, planning.degree and planning.largest_degree"
            )
        words = (options.key_tokens, options.value_tokens, options.seed)
        cells = product(options.lengths, options.depths, range(options.samples))
        self.needles = [Needle(haystack, length, depth, number, *words) for length, depth, number in cells]
        self._pieces = needle_pieces(self.needles)
        self._first_answers = torch.tensor([needle.first_answer for needle in self.needles])
        self._options, self._model, self._engine, self._planner = options, model, engine, planner

    def run(self) -> NeedleResult:
        """Ask for every value. All ranks call it and get the same result."""
        engine = self._engine
        plan = self._planner.now(self._pieces, self.needles)
        packs = PlannedPacks(engine.packs_of(plan), self._pieces, self.needles, self._model.config.vocab_size, engine.grid.dp.rank)
        scores = ScoreSums(self._model, len(self.needles))
        with scores.watching():
            loss, tokens, hits = engine.evaluate(ChangedPacks(packs, self._only_answers), scores)
        options = self._options
        cells = (len(options.lengths), len(options.depths), options.samples)
        exact = (hits == options.value_tokens).double().view(cells).mean(2)
        log_probability = -loss.view(cells).sum(2) / tokens.view(cells).sum(2)
        return NeedleResult(options.lengths, options.depths, options.samples, exact.tolist(), log_probability.tolist())

    def _only_answers(self, batch: PackedBatch) -> PackedBatch:
        """``batch`` with weight on the tokens that the value is due after."""
        due = batch.positions >= self._first_answers[batch.sources]
        return replace(batch, loss_weight=batch.loss_weight * due)
