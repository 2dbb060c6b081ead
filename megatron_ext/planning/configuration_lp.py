"""Seconds that no plan goes below, because of what packs of whole documents can hold: linear programs over patterns, by column generation.

Documents have prices, and a rank earns its share of those that it computes. Most that it earns in a pack of so many seconds is a knapsack
(Gilmore & Gomory 1961, doi:10.1287/opre.9.6.849), most that it earns in a step the best sequence of packs. A step in which the ranks
cannot earn the prices of all documents is too short, whatever the prices (the bound of Farley 1990, doi:10.1287/opre.38.5.922), so that
pricing may stop at any time. Tried are prices at which the sequences found so far earn least.

Without rounds, every rank has a sequence of its own. In rounds, the lengths of all ranks are the same: steps are bounded apart by their
number of rounds and by intervals of the longest, which are divided where the bound is least. Inside an interval, lengths are mixed.

Every simplification allows more than plans may do: documents much shorter than a block's memory may be divided; tokens are rounded down to
cells; exchanges are lowered to a straight line; each document alone, and packs on average, keep to the seconds of a pack.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from megatron_ext.planning.bounds import DocumentTimes, fewest_rounds
from megatron_ext.planning.cost_model import Array
from megatron_ext.planning.plan import IntArray
from megatron_ext.planning.step import Step

CELLS = 1024
"""Of the memory of a block."""
LARGE = 10
"""Documents of more than one in so many parts of a block's memory are kept whole."""
SHADOWS = np.concatenate([[0.0], np.linspace(0.3, 1.5, 25)])
"""Prices of a second that knapsacks try, relative to what a rank earns in a second at least."""
CLASSES = 1024
"""Lengths of packs that are told apart: class k is from k to k + 1 parts of the most seconds."""
SHORT = 12
"""Classes of packs of which a rank may compute any part."""
KNOTS = 16
"""The longest documents, and as many others, whose prices are free; those between have prices between."""
DEAREST = (4.0, 40.0, 4000.0)
"""Factors that prices are at most above the last that raised a bound; the next where a linear program is met."""
SMOOTH = 0.5
"""Weight of the last prices that raised a bound (Wentges 1997, doi:10.1016/S0969-6016(97)00001-4)."""
ROUNDS = 4
"""Numbers of rounds that are told apart; more are bounded by what they cost and by the documents' work."""
INTERVALS = 12
"""Of the longest round, to begin with."""
ITERATIONS = 150
"""Pricings of a step at most."""
WAIT = 40
"""Pricings that raise nothing until an interval is divided."""
SEQUENCES = 30
"""Added to a linear program at most, before it is priced."""
MET = 1e-3
"""Share by which a linear program may miss the seconds that it is to be done in."""
FIRST_REACH, LAST_REACH = 0.12, 8.0
"""Shares above the known bound up to which a better one is looked for: three times as far where it is not found within."""
SAFETY = 1e-6
"""Share by which bounds are lowered, far above what rounding adds."""


@njit(cache=True)
def fill_cells(best: NDArray, cells: NDArray, worth: NDArray, found: NDArray, taken: NDArray) -> None:
    """Knapsacks of whole documents, by shadow.

    Args:
        best: worth by cells before any of the documents, [shadows, cells]; overwritten with that after all of them.
        cells: of the documents.
        worth: [documents, shadows].
        found: written: worth of all cells after none, one ... all of the documents, [documents + 1, shadows].
        taken: written, unless it is empty: whether the best takes a document, [documents, shadows, cells].
    """
    shadows, last = best.shape[0], best.shape[1] - 1
    for shadow in range(shadows):
        row = best[shadow]
        found[0, shadow] = row[last]
        for document in range(len(cells)):
            size, more = cells[document], worth[document, shadow]
            for cell in range(last, size - 1, -1):
                other = row[cell - size] + more
                if other > row[cell]:
                    row[cell] = other
                    if len(taken):
                        taken[document, shadow, cell] = True
            found[document + 1, shadow] = row[last]


@dataclass(frozen=True)
class Block:
    """Packs of one degree, of the documents of a step."""

    degree: int
    fixed: float
    """Seconds of every pack."""
    seconds: Array
    """That each document adds to a pack."""
    large: IntArray
    """Documents that are kept whole, ascending by their seconds alone."""
    cells: IntArray
    """Of memory, of each of them."""
    alone: Array
    """Seconds of a pack of each of them."""
    small: IntArray
    """Documents that may be divided."""
    room: Array
    """Cells of each of them."""

    @classmethod
    def of(cls, step: Step, row: int, own: Array) -> "Block":
        """Of a step without empty documents; ``own`` as in ``DocumentTimes``."""
        degree, lengths, capacity = step.degrees[row], step.lengths, step.cost.capacity(step.degrees[row])
        latency, rate = line_below(step.exchange.tokens[row], step.exchange.seconds[row], step.exchange.least_rate(row))
        large = np.flatnonzero((lengths <= capacity) & (lengths * LARGE > capacity))
        large = large[np.argsort(own[large], kind="stable")]
        small = np.flatnonzero(lengths * LARGE <= capacity)
        return cls(
            degree,
            step.cost.per_pack + latency,
            np.maximum(step.work / degree + rate * lengths, np.finfo(float).tiny),
            large,
            lengths[large] * CELLS // capacity,
            own[large] + step.cost.per_pack,
            small,
            lengths[small] * (CELLS / capacity),
        )

    def allowed(self, seconds: Array | float) -> IntArray:
        """How many of the large documents alone take at most so many seconds."""
        return np.searchsorted(self.alone, np.asarray(seconds) * (1 + 1e-9), side="right")

    def density(self, prices: Array, seconds: float) -> float:
        """Most that a rank earns in a second of a pack of at most so many."""
        known = np.concatenate([self.small, self.large[: self.allowed(seconds)]])
        return float((prices[known] / self.seconds[known]).max(initial=0.0)) * max(0.0, 1.0 - self.fixed / seconds) / self.degree

    def divided(self, worth: Array) -> tuple[IntArray, Array, Array]:
        """Small documents worth something, the densest first; and the cells and the worth of the first none, one ... all of them."""
        order = np.argsort(-worth[self.small] / self.room, kind="stable")
        order = order[worth[self.small[order]] > 0]
        cells, sums = (np.concatenate([[0.0], np.cumsum(each[order])]) for each in (self.room, worth[self.small]))
        return self.small[order], cells, sums

    def fill(self, prices: Array, shadows: Array, keep: bool = False) -> tuple[Array, NDArray[np.bool_]]:
        """Worth of the best packs where a second costs ``shadows``: of the small documents and the first none, one ... all large ones.

        Returns:
            [large documents + 1, shadows], and, to ``keep``, whether each large document is taken, by shadow and cells.
        """
        best = np.array([np.interp(np.arange(CELLS + 1), *self.divided(prices - each * self.seconds)[1:]) for each in shadows])
        worth = prices[self.large, None] - self.seconds[self.large, None] * shadows
        found = np.empty((len(self.large) + 1, len(shadows)))
        taken = np.zeros((len(self.large) if keep else 0, *best.shape), dtype=np.bool_)
        fill_cells(best, self.cells, worth, found, taken)
        return found, taken

    def earned(self, prices: Array, shadows: Array, seconds: Array) -> tuple[Array, IntArray]:
        """Most that a rank earns in a pack, and which of the shadows says so, by seconds of the pack."""
        left = seconds - self.fixed
        worth = self.fill(prices, shadows)[0][self.allowed(seconds)] + np.maximum(left, 0.0)[:, None] * shadows
        return np.where(left >= -1e-9 * seconds, worth.min(axis=1), 0.0) / self.degree, worth.argmin(axis=1)

    def pattern(self, prices: Array, shadows: Array, at: int, seconds: float) -> Array:
        """A rank's share of each document in the best pack at shadow ``at``, mixed with one beside it to take ``seconds`` on average."""
        first = max(0, at - 1)
        near = shadows[first : at + 2]
        taken = self.fill(prices, near, keep=True)[1][: self.allowed(seconds)]
        packs = [self._best(prices - each * self.seconds, taken[:, place]) for place, each in enumerate(near)]
        used, left = [float(self.seconds @ pack) for pack in packs], seconds - self.fixed
        chosen = at - first
        beside = min(len(near) - 1, chosen + 1) if used[chosen] > left else max(0, chosen - 1)
        apart = used[beside] - used[chosen]
        part = min(1.0, max(0.0, (left - used[chosen]) / apart)) if apart else 0.0
        return ((1 - part) * packs[chosen] + part * packs[beside]) / self.degree

    def _best(self, worth: Array, taken: NDArray[np.bool_]) -> Array:
        chosen, left = np.zeros(len(worth)), CELLS
        for number in reversed(range(len(taken))):
            if taken[number, left]:
                chosen[self.large[number]], left = 1.0, left - int(self.cells[number])
        order, cells, _ = self.divided(worth)
        chosen[order] = np.clip((left - cells[:-1]) / np.diff(cells), 0.0, 1.0)
        return chosen


@dataclass
class Branch:
    """Some of the plans of a step."""

    rounds: int | None
    """How many there are; None: ranks compute any number of packs one after another."""
    low: int
    """Class of the longest round at least."""
    high: int
    """At most."""
    bound: int
    """Classes that sum up in every such plan at least."""

    def earned(self, earned: Array, dense: float = 0.0) -> tuple[Array, Callable[[int], list[int]]]:
        """Most that a rank earns, by sum of classes, and from such a sum to the classes.

        Args:
            earned: in a pack, by its class; longer ones earn no less.
            dense: in a class of short packs.
        """
        if self.rounds is None:
            return any_number(earned, dense)
        best, picks = np.zeros(CLASSES), []
        for low in [0] * (self.rounds - 1) + [self.low]:
            before = np.concatenate([np.full(self.high, -np.inf), best])
            sums = sliding_window_view(before, self.high - low + 1)[:CLASSES, ::-1] + earned[low : self.high + 1]
            picks.append(low + sums.argmax(axis=1))
            best = sums.max(axis=1)

        def classes(total: int) -> list[int]:
            chosen = []
            for pick in reversed(picks):
                chosen.append(int(pick[total]))
                total -= chosen[-1]
            return chosen

        return best, classes

    def has(self, classes: list[int], total: int) -> bool:
        """Whether packs of these classes are such a plan of ``total`` classes at most."""
        longest, count = max(classes, default=0), self.rounds or len(classes)
        return sum(classes) <= total and (self.rounds is None or (len(classes) == count and self.low <= longest <= self.high))

    def halves(self) -> list["Branch"]:
        """Divided by the longest round; itself where it cannot be divided."""
        if self.rounds is None or self.low == self.high:
            return [self]
        middle = (self.low + self.high) // 2
        return [replace(self, high=middle), replace(self, low=middle + 1)]


def any_number(earned: Array, dense: float) -> tuple[Array, Callable[[int], list[int]]]:
    """As ``Branch.earned``, of any number of packs one after another. Short ones earn for each second what the best of them does."""
    best, last = dense * np.arange(1, CLASSES + 1), np.full(CLASSES, -1)
    for total in range(SHORT, CLASSES):
        sums = earned[SHORT : total + 1] + best[total - SHORT :: -1]
        pick = int(sums.argmax())
        if sums[pick] > best[total]:
            best[total], last[total] = sums[pick], SHORT + pick

    def classes(total: int) -> list[int]:
        chosen = []
        while last[total] >= 0:
            chosen.append(int(last[total]))
            total -= chosen[-1]
        return chosen

    return best, classes


@dataclass
class Program:
    """The linear program over what was found so far, as its dual: prices of knots, and what packs may earn, more for longer ones."""

    needed: Array
    """What prices of 1 earn, by knot."""
    patterns: list[Array] = field(default_factory=list)
    """Part of it that a rank earns, by knot."""
    classes: list[int] = field(default_factory=list)
    """Of the patterns."""
    sequences: list[list[int]] = field(default_factory=list)
    """Classes of the packs of ranks that were needed last."""

    def prices(self, branch: Branch, dearest: Array) -> tuple[float, Array]:
        """Ranks that are needed, as a factor of those there are, and prices of the knots that tell: they earn 1 together."""
        usable = [number for number, kind in enumerate(self.classes) if kind <= branch.high]
        if not usable:
            return np.inf, dearest / (self.needed @ dearest)
        kinds, kind = np.unique(np.array(self.classes)[usable], return_inverse=True)
        prices, count, patterns = len(self.needed), len(kinds), len(usable)
        rows = np.zeros((patterns + count - 1, prices + count))
        rows[:patterns, :prices] = np.array(self.patterns)[usable]
        rows[np.arange(patterns), prices + kind] = -1.0
        rows[patterns:, prices:] = np.eye(count)[:-1] - np.eye(count)[1:]
        worth, upper = np.append(self.needed, np.zeros(count)), np.append(dearest, np.full(count, np.inf))
        place = np.searchsorted(kinds, np.arange(CLASSES), side="right") - 1
        total, earned = min(branch.bound, CLASSES - 1), np.arange(CLASSES, dtype=np.float64)
        sequences = [each for each in self.sequences if branch.has(each, total)]
        others = [each for each in self.sequences if not branch.has(each, total)]
        for number in range(SEQUENCES):
            most, classes = branch.earned(earned)
            if number and most[total] <= 1 + MET / 4:
                break
            sequences.append(classes(total))
            paid = np.array([np.bincount(1 + place[each], minlength=1 + count)[1:] for each in sequences])
            system = np.concatenate([rows, np.pad(paid, ((0, 0), (prices, 0)))])
            found, duals = maximise(worth, system, np.repeat([0.0, 1.0], [len(rows), len(paid)]), upper)
            found = np.maximum(found, 0.0)
            earned = np.where(place >= 0, found[prices:][place], 0.0)
        self.sequences = others + [each for each, dual in zip(sequences, duals[len(rows) :], strict=True) if abs(dual) > 1e-9]
        ranks = float(self.needed @ found[:prices])
        return ranks, found[:prices] / ranks


def maximise(worth: Array, rows: Array, most: Array, upper: Array) -> tuple[Array, Array]:
    """The point of most ``worth`` between 0 and ``upper`` whose ``rows`` are at most ``most``."""
    import highspy

    solver, model, used = highspy.Highs(), highspy.HighsLp(), rows != 0
    for key, value in (("output_flag", False), ("threads", 1), ("random_seed", 0)):
        solver.setOptionValue(key, value)
    model.num_row_, model.num_col_ = rows.shape
    model.col_cost_, model.col_lower_, model.col_upper_ = -worth, np.zeros(len(worth)), upper
    model.row_lower_, model.row_upper_ = np.full(len(rows), -highspy.kHighsInf), most
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.append(0, np.cumsum(used.sum(axis=1)))
    model.a_matrix_.index_, model.a_matrix_.value_ = np.nonzero(used)[1], rows[used]
    solver.passModel(model)
    solver.run()
    found = solver.getSolution()
    return np.array(found.col_value), np.array(found.row_dual)


def line_below(tokens: Array, seconds: Array, least_rate: float) -> tuple[float, float]:
    """Latency and seconds a token, neither negative, of a line above none of the points: the highest at half of the most tokens."""
    rises, runs = seconds[:, None] - seconds, tokens[:, None] - tokens
    slopes = np.append(np.divide(rises, runs, out=np.zeros_like(runs), where=runs > 0).ravel(), least_rate)
    slopes = slopes[slopes >= 0]
    latencies = np.maximum((seconds - slopes[:, None] * tokens).min(axis=1), np.where(slopes == least_rate, 0.0, -np.inf))
    best = int(np.where(latencies >= 0, latencies + slopes * tokens[-1] / 2, -1.0).argmax())
    return float(latencies[best]), float(slopes[best])


def interpolation(lengths: IntArray) -> Array:
    """Part of each knot in each document, [documents, knots]: knots are the longest documents, the shortest, and quantiles of tokens."""
    ascending = np.sort(lengths)
    share = np.cumsum(ascending) / ascending.sum()
    quantiles = ascending[np.searchsorted(share, np.arange(KNOTS) / KNOTS)]
    knots = np.unique(np.concatenate([quantiles, np.unique(lengths)[-KNOTS:]])).astype(np.float64)
    return np.array([np.interp(lengths, knots, each) for each in np.eye(len(knots))]).T


@dataclass
class Search:
    """Bounds of the branches of one step, the least of them raised again and again."""

    blocks: list[Block]
    weights: Array
    """What a price of 1 of each knot pays for each document, [documents, knots]."""
    seconds: float
    """Of a class."""
    rate: float
    """What a rank earns in a second at least, where all documents pay 1 a rank."""
    program: Program
    prices: Array
    """The last that raised a bound, by knot."""
    branches: list[Branch]

    def run(self, beyond: int) -> int:
        """Classes that sum up in all plans at least, as far as found, where those outside the branches sum up to ``beyond``."""
        smooth, waited = SMOOTH, 0
        for _ in range(ITERATIONS):
            branch = min(self.branches, key=lambda each: each.bound)
            if branch.bound >= beyond:
                break
            ranks, prices = self.priced(branch)
            if ranks > 1 + MET:
                before, pays = branch.bound, self.improve(branch, ranks, prices, smooth)
                if branch.bound > before:
                    smooth, waited = SMOOTH, 0
                    continue
                waited += 1
                if pays or smooth:
                    smooth *= 0.8 if pays else 0.0
                    if waited <= WAIT or branch.rounds is None:
                        continue
            halves = branch.halves()
            if len(halves) == 1:
                break
            self.branches.remove(branch)
            self.branches.extend(halves)
            smooth, waited = SMOOTH, 0
        return min(beyond, *(each.bound for each in self.branches))

    def priced(self, branch: Branch) -> tuple[float, Array]:
        """As ``Program.prices``, with prices as dear as it takes."""
        found = np.inf, self.prices
        for factor in DEAREST:
            found = self.program.prices(branch, factor * np.maximum(self.prices, 1.0))
            if found[0] > 1 + MET:
                break
        return found

    def improve(self, branch: Branch, ranks: float, prices: Array, smooth: float) -> bool:
        """Price once. Returns whether patterns were found that pay more than the linear program knew."""
        mixed = smooth * self.prices + (1 - smooth) * prices
        mixed /= self.program.needed @ mixed
        documents = self.weights @ mixed
        ends = self.seconds * np.arange(1, CLASSES + 1)
        earned, shadow = map(np.array, zip(*(each.earned(documents, self.shadows(each), ends) for each in self.blocks), strict=True))
        row = earned.argmax(axis=0)
        dense = max(each.density(documents, float(ends[SHORT - 1])) for each in self.blocks)
        most, classes = branch.earned(earned.max(axis=0), dense * self.seconds)
        reached = int(np.append(most >= 1 - 1e-9, True).argmax())
        if reached > branch.bound:
            branch.bound, self.prices = reached, mixed
        paid = 0.0
        for kind in classes(min(branch.bound, CLASSES - 1)):
            block, at = self.blocks[row[kind]], int(shadow[row[kind], kind])
            self.program.patterns.append(block.pattern(documents, self.shadows(block), at, float(ends[kind])) @ self.weights)
            self.program.classes.append(kind)
            paid += float(self.program.patterns[-1] @ prices)
        return paid > (1 + MET) / ranks

    def shadows(self, block: Block) -> Array:
        """Prices of a second of a pack that are tried."""
        return SHADOWS * (self.rate * block.degree)


def configuration_bound(step: Step, area: float) -> float:
    """Seconds that no plan of a step goes below, not less than ``area``, below which none goes either. Documents have to fit.

    The same arguments give the same seconds: the work is bounded by counts, and solvers use one thread.
    """
    some = step.lengths > 0
    if area <= 0:
        return area
    step, reach = replace(step, lengths=step.lengths[some], work=step.work[some]), FIRST_REACH
    while True:
        most = area * (1 + reach)
        found = _bound_within(step, area, most)
        if found < most * (1 - 2 * SAFETY) or reach >= LAST_REACH:
            return max(area, found)
        area, reach = found, 3 * reach


def _bound_within(step: Step, area: float, most: float) -> float:
    """As :func:`configuration_bound`, but no more than ``most`` seconds."""
    times, per_pack, seconds = DocumentTimes.of(step), step.cost.per_pack, most / CLASSES
    least = times.device.min(axis=1)
    work = float(least.sum()) / step.devices
    natural = np.maximum(least + per_pack * step.lengths / step.cost.tokens_per_rank, np.finfo(float).tiny)
    weights = interpolation(step.lengths) * (natural * step.devices / natural.sum())[:, None]

    def classes(at_least: float) -> int:
        return min(CLASSES, int(at_least * (1 - 1e-9) / seconds))

    branches, beyond = [Branch(None, 0, CLASSES - 1, classes(area))], CLASSES
    if step.in_rounds:
        fewest = fewest_rounds(step)
        longest = classes(per_pack + float(times.own.min(axis=1).max()))
        edges = np.unique(np.linspace(longest, CLASSES, INTERVALS + 1).astype(int)).tolist()
        branches = [
            Branch(rounds, low, high - 1, max(low, classes(max(area, rounds * per_pack + work))))
            for rounds in range(fewest, fewest + ROUNDS)
            for low, high in pairwise(edges)
        ]
        beyond = classes(max(area, (fewest + ROUNDS) * per_pack + work))
    blocks = [Block.of(step, row, times.own[:, row]) for row in range(len(step.degrees))]
    program = Program(weights.sum(axis=0) / step.devices)
    search = Search(blocks, weights, seconds, 1.0 / max(work, np.finfo(float).tiny), program, np.ones(weights.shape[1]), branches)
    return search.run(beyond) * seconds * (1 - SAFETY)
