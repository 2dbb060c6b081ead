"""Tells a run that hangs from one that is slow, and the rank that the others wait for from those that wait."""

import json
import statistics
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.parallel.activity import WORK, Activity, Collective, Moment

RARE = ("start", "load", "end")
"""Phases that come seldom, and may take long once: models are built, kernels are compiled, logs are handed over."""
MEETING = ("forward", "backward", "optimizer", "exchange", "record", "evaluate")
"""Phases in which a host may wait for what its device waits for."""
RARELY = 4.0
"""In rare phases, and until the first step has ended, the limit is at least so many times the timeout."""
STEPS = 10.0
"""No limit is below so many times the median step."""
OF_COLLECTIVE = 0.8
"""No limit is above this part of the collectives' timeout, after which nobody could tell any more who was late."""


@dataclass(frozen=True)
class Report:
    """What a rank says of itself with a beat."""

    moves: int
    """Grows whenever the moment changes."""
    moment: Moment

    @classmethod
    def of(cls, activity: Activity) -> "Report":
        """A report of what ``activity`` says now."""
        return cls(activity.moves, activity.now)

    def encode(self) -> str:
        """As text; ``decode`` reads it."""
        return json.dumps([self.moves, *self.moment])

    @classmethod
    def decode(cls, text: str) -> "Report":
        """What ``encode`` wrote."""
        moves, step, phase, pack, collective = json.loads(text)
        waits = Collective(collective[0], collective[1], tuple(collective[2]), collective[3]) if collective else None
        return cls(moves, Moment(step, phase, tuple(pack) if pack else None, waits))


@dataclass(frozen=True)
class Hang:
    """A run that stands still."""

    ranks: list[int]
    """Those that the others wait for, the likeliest first."""
    what: str
    """Of the first: continues a sentence that begins with its name."""
    limit: float
    """Seconds of standstill that were too many."""


class HangWatch:
    """Judges the reports of all ranks. A run stands still when no rank has moved for the limit and one of them waits for others.

    Where devices work on while their hosts go on, collectives return at once, and a host waits wherever it reads a value. There every rank
    in a phase with work for the device may be one that waits.

    Args:
        timeout: least limit, in seconds; it grows with the median step.
        collective_timeout: seconds after which a collective gives up.
        asynchronous: devices work on while their hosts go on.
    """

    def __init__(self, timeout: float, collective_timeout: float, asynchronous: bool = False) -> None:
        self._timeout, self._most, self._asynchronous = timeout, OF_COLLECTIVE * collective_timeout, asynchronous
        self._moved: dict[int, tuple[int, float]] = {}
        self._step: tuple[int, float] | None = None
        self._step_seconds: deque[float] = deque(maxlen=101)

    def limit(self, phases: Collection[str] = ()) -> float:
        """Seconds of standstill that are too many while ranks are in these phases."""
        is_rare = not self._step_seconds or any(phase in RARE for phase in phases)
        usual = STEPS * statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return min(max(RARELY * self._timeout if is_rare else self._timeout, usual), max(self._timeout, self._most))

    def judge(self, reports: Mapping[int, Report], now: float, silent: Collection[int] = ()) -> Hang | None:
        """What to say of the last reports of all ranks at ``now``, in seconds of any clock; ``silent`` ranks have stopped to report."""
        for rank, report in reports.items():
            if self._moved.get(rank, (None, 0.0))[0] != report.moves:
                self._moved[rank] = (report.moves, now)
        self._count_step(reports[0].moment.step, now)
        moments = {rank: report.moment for rank, report in reports.items()}
        limit = self.limit([moment.phase for moment in moments.values()])
        still = now - max(when for _, when in self._moved.values())
        if still <= limit or not self._must_meet(moments.values()):
            return None
        late = sorted(silent or waited_for(moments), key=lambda rank: (moments[rank].step, self._moved[rank][1]))
        seconds = now - self._moved[late[0]][1]
        state = "is silent" if late[0] in silent else "has not moved"
        nobody = ", and all ranks wait for each other" if len(late) == len(moments) else ""
        return Hang(late, f"{state} for {seconds:.0f} s{nobody}: {moments[late[0]]}. {_others(moments, late[0])}", limit)

    def _must_meet(self, moments: Collection[Moment]) -> bool:
        """Whether a rank waits for others, or may do so without a word."""
        waits = any(moment.collective or (self._asynchronous and moment.phase in MEETING) for moment in moments)
        return waits and all(moment.phase for moment in moments)

    def _count_step(self, step: int, now: float) -> None:
        if self._step is None or self._step[0] != step:
            if self._step is not None and step > self._step[0] > 0:
                self._step_seconds.append((now - self._step[1]) / (step - self._step[0]))
            self._step = (step, now)


def waited_for(moments: Mapping[int, Moment]) -> list[int]:
    """The ranks that hold the others up.

    Those that are in no collective, if there are any: the others wait for them, some through others. Of these the ones that are furthest
    behind, because the others may wait, too, where a device was only given its work. If all are in one, they do not agree which: then
    those that most ranks wait for, because they are not in the collective of these ranks.
    """
    progress = {rank: (moment.step, moment.phase not in WORK) for rank, moment in moments.items() if moment.collective is None}
    if progress:
        return [rank for rank, place in progress.items() if place == min(progress.values())]
    missed: Counter[int] = Counter(
        other
        for moment in moments.values()
        if moment.collective is not None
        for other in moment.collective.ranks
        if moments[other].collective != moment.collective
    )
    most = max(missed.values(), default=0)
    return [rank for rank in moments if missed[rank] == most]


def _others(moments: Mapping[int, Moment], named: int) -> str:
    """What the other ranks do, those that do the same together."""
    alike: dict[Moment, list[int]] = {}
    for rank, moment in moments.items():
        if rank != named:
            alike.setdefault(moment, []).append(rank)
    return "; ".join(f"rank{'s' * (len(ranks) > 1)} {_numbers(ranks)}: {moment}" for moment, ranks in alike.items())


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown
