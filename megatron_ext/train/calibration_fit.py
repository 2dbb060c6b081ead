"""From measured seconds to the numbers of a cost model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from megatron_ext.planning.cost_model import Array, CostModel, Curve


@dataclass(frozen=True)
class Fit:
    """How well a cost model says the seconds that it was fitted to."""

    r_squared: float
    """Share of the variance of the seconds that it explains."""
    worst: float
    """Largest error of a pack, as a share of its seconds."""


def fit_compute(cost: CostModel, packs: Sequence[Sequence[int]], seconds: Sequence[float]) -> tuple[CostModel, Fit]:
    """Find ``per_token``, ``per_token_squared`` and ``per_pack``, none below 0, of least squared relative errors.

    Relative, because clocks and other programs disturb long packs by more seconds than short ones.

    Args:
        cost: the rest of the model; its efficiencies are taken into account.
        packs: lengths of the documents of each pack, in tokens; computed by one data rank.
        seconds: of each pack, above 0.
    """
    linear, squared = replace(cost, per_token=1.0, per_token_squared=0.0), replace(cost, per_token=0.0, per_token_squared=1.0)
    parts = np.array([[float(each.work(lengths).sum()) for each in (linear, squared)] + [1.0] for lengths in map(np.array, packs)])
    measured = np.array(seconds, dtype=np.float64)
    coefficients = nonnegative_least_squares(parts / measured[:, None], np.ones(len(measured)))
    errors = parts @ coefficients - measured
    variance = float(((measured - measured.mean()) ** 2).sum())
    fit = Fit(1.0 - float(errors @ errors) / variance if variance > 0 else 1.0, float(np.abs(errors / measured).max()))
    per_token, per_token_squared, per_pack = coefficients.tolist()
    return replace(cost, per_token=per_token, per_token_squared=per_token_squared, per_pack=per_pack), fit


def nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    """The x >= 0 of least ``|matrix x - target|``, for few columns.

    The solution is that of plain least squares on the columns where it is not 0, so every choice of columns is tried.

    Args:
        matrix: [m, n].
        target: [m].
    """
    count = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(count), float(np.linalg.norm(target))
    for chosen in (list(each) for size in range(1, count + 1) for each in combinations(range(count), size)):
        solution = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)[0]
        error = float(np.linalg.norm(matrix[:, chosen] / scale[chosen] @ solution - target))
        if solution.min() >= 0 and error < least:
            best, least = np.zeros(count), error
            best[chosen] = solution / scale[chosen]
    return best


def attention_efficiency(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``CostModel.efficiency_tokens`` and ``CostModel.efficiency``: squared tokens a second as a share of the most.

    Args:
        tokens: lengths of documents, ascending.
        seconds: of attention, for one document of each length, above 0.
    """
    lengths = np.array(tokens, dtype=np.float64)
    rate = lengths**2 / without_dips(seconds)
    return tuple(lengths.tolist()), tuple((rate / rate.max()).tolist())


def curve_of(sent: Sequence[int], seconds: Sequence[float]) -> Curve:
    """A curve through measured points, ascending in bytes; seconds above 0."""
    return Curve(tuple(map(float, sent)), tuple(without_dips(seconds).tolist()))


def without_dips(seconds: Sequence[float]) -> Array:
    """The non-decreasing seconds that are nearest by ratio: more does not take less, so a dip is noise of both of its sides.

    Pool-adjacent-violators (Ayer et al. 1955), on logarithms.
    """
    pools: list[tuple[float, int]] = []
    for value in np.log(np.array(seconds, dtype=np.float64)).tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (right, many), (left, few) = pools.pop(), pools.pop()
            pools.append(((left * few + right * many) / (few + many), few + many))
    return np.exp(np.repeat([value for value, _ in pools], [count for _, count in pools]))
