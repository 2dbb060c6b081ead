"""How ranks shared packs, in numbers: what the records of steps and of plans say of it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.summary import Phase, chain_of


@dataclass(frozen=True)
class Sharing:
    """The plans of all phases. Numbers that no step has are NaN."""

    policies: tuple[str, ...]
    """Of the runs, in their order, without repetitions."""
    median_gap: float
    """Predicted seconds of a step over their lower bound, less 1; NaN where no step is above a bound, as where none is known."""
    median_exchange_share: float
    """Of a step's seconds, those in all-to-alls; NaN where they were not measured."""
    adaptive_steps: int
    """Steps that an adaptive run has planned."""
    fallback_steps: int
    """Those of them for which it took the best static plan."""
    stall_seconds: float
    """That training waited for plans, in all."""
    tokens_by_degree: dict[int, int]
    """Tokens by the number of ranks that share their pack, by increasing degree."""

    @property
    def facts(self) -> dict[str, str]:
        """Names and values as people read them, without those that are not known."""
        steps = f"{self.fallback_steps:,} of {self.adaptive_steps:,}" if self.adaptive_steps else "n/a"
        facts = {
            "Planning policy": ", ".join(self.policies).replace("_", " ") or "n/a",
            "Median gap to the bound": formats.share(self.median_gap),
            "Median share of exchanges": formats.share(self.median_exchange_share),
            "Steps planned by fallback": steps,
            "Waited for plans": formats.seconds(self.stall_seconds),
        }
        return {name: value for name, value in facts.items() if value != "n/a"}


def sharing(phases: Sequence[Phase]) -> Sharing | None:
    """The plans of all phases but control runs, or None where every rank computed whole documents, for all that the records say."""
    runs = [phase.run for phase in chain_of(phases)]
    if not any(_shares(run) for run in runs):
        return None
    adaptive = [policy for run in runs for policy in _made_for_adaptive(run)]
    stalls = _known(runs, "plan_stall_seconds")
    return Sharing(
        policies=tuple(dict.fromkeys(policy for run in runs if (policy := _policy(run)))),
        median_gap=_median_if_positive(_known(runs, "plan_gap")),
        median_exchange_share=_median_if_positive(_known(runs, "exchange_share")),
        adaptive_steps=len(adaptive),
        fallback_steps=adaptive.count("best_static"),
        stall_seconds=float(stalls.sum()) if len(stalls) else math.nan,
        tokens_by_degree=_tokens_by_degree(runs),
    )


def _shares(run: Run) -> bool:
    """Some plan lets ranks share a pack, or was made by a policy that might."""
    in_plans = any((plan.work["degree"] > 1).any() for plan in run.plans)
    return in_plans or any(
        record.plan_policy not in ("", "data_parallel")
        or any(int(degree) > 1 and tokens for degree, tokens in record.tokens_by_degree.items())
        for record in run.train
    )


def _policy(run: Run) -> str:
    """That the run was configured with or, where its configuration does not say, that made its last plan."""
    planning = run.config.get("planning")
    configured = planning.get("policy") if isinstance(planning, dict) else None
    made = [record.plan_policy for record in run.train if record.plan_policy]
    return configured if isinstance(configured, str) else made[-1] if made else ""


def _made_for_adaptive(run: Run) -> list[str]:
    """The policies that made the plans while the run was adaptive. It may have been so between some of its starts only."""
    made: dict[int, list[str]] = {}
    for record in run.train:
        if record.plan_policy:
            attempt = max((number for number, start in enumerate(run.starts) if start.step < record.step), default=0)
            made.setdefault(attempt, []).append(record.plan_policy)
    last = len(run.starts) - 1
    adaptive = [attempt for attempt in made if "adaptive" in made[attempt] or (attempt == last and _policy(run) == "adaptive")]
    return [policy for attempt in adaptive for policy in made[attempt]]


def _tokens_by_degree(runs: Sequence[Run]) -> dict[int, int]:
    totals: Counter[int] = Counter()
    for run in runs:
        for record in run.train:
            totals.update({int(degree): tokens for degree, tokens in record.tokens_by_degree.items()})
    return {degree: totals[degree] for degree in sorted(totals) if totals[degree]}


def _known(runs: Sequence[Run], column: str) -> np.ndarray:
    values = np.concatenate([run.column(column) for run in runs])
    return values[np.isfinite(values)]


def _median_if_positive(values: np.ndarray) -> float:
    return float(np.median(values)) if (values > 0).any() else math.nan
