"""What a rank is doing: step, phase, pack and the collective that it waits in, for whoever watches over it; and how long it worked."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch.distributed as dist

Item = TypeVar("Item", covariant=True)
WORK = ("data", "forward", "backward")
"""Phases of a step in which a rank works on its own packs; in the others ranks mostly wait for each other."""


class Items(Sized, Iterable[Item], Protocol[Item]):
    """What can be counted and gone through."""


class Collective(NamedTuple):
    """A collective, such that those that belong together are equal on all ranks."""

    name: str
    axis: str
    ranks: tuple[int, ...]
    """Global ranks that take part; of a message, only the other one; empty if they are not known."""
    number: int
    """How many of this name these ranks have begun, with this one."""

    def __str__(self) -> str:
        place = f" of ranks {', '.join(map(str, self.ranks))}" if 0 < len(self.ranks) <= 16 else f" of {len(self.ranks)} ranks"
        return f"{self.name} ({self.axis}{place if self.ranks else ''}, call {self.number})"


class Moment(NamedTuple):
    """What a rank is doing."""

    step: int = 0
    """The step that it computes, or after which it does something else; 0 before the first."""
    phase: str = ""
    """Of a step ``data``, ``plan``, ``forward``, ``backward``, ``optimizer``, ``exchange``, ``record``; around steps ``start``, ``load``,
    ``evaluate``, ``save``, ``end``; empty where nobody said."""
    pack: tuple[int, int] | None = None
    """Number of the pack in this step, from 1, and number of all packs."""
    collective: Collective | None = None
    """That it waits in."""

    def __str__(self) -> str:
        pack = f" of pack {self.pack[0]} of {self.pack[1]}" if self.pack else ""
        return f"step {self.step}, {self.phase or 'not in a run'}{pack}" + (f", in {self.collective}" if self.collective else "")


class Activity:
    """Keeps the moment of one rank. Made once a rank and handed around; the thread that trains changes it, others may read it.

    Seconds are those of the host. On a GPU they include what the host waits for where it reads a result, as the losses at the end of every
    pack: the device's work, and there also its waiting for the ranks that share a pack or a tensor.
    """

    def __init__(self) -> None:
        self.now = Moment()
        self.moves = 0
        """Changes with every change of the moment and with every call of ``move``."""
        self._seconds: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._begun: Counter[tuple[str, str, tuple[int, ...]]] = Counter()

    def begin(self, phase: str, step: int | None = None, pack: tuple[int, int] | None = None) -> None:
        """Another phase begins; with ``step`` of that step, from which on seconds are counted anew."""
        self._change(Moment(self.now.step if step is None else step, phase, pack))
        if step is not None:
            self._seconds.clear()

    def move(self) -> None:
        """Tell of progress within the moment, such as a tensor that was written. Threads that work for this rank may call it, too."""
        self.moves += 1

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Go through items, each of which is a move."""
        for item in items:
            self.move()
            yield item

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Around what is a phase of its own inside another, which goes on afterwards."""
        before = self.now
        self.begin(phase)
        yield
        self._change(before)

    def packs(self, packs: Items[Item], phase: str = "forward") -> Iterator[Item]:
        """Go through packs: each is read in phase ``data`` and handed over in ``phase``."""
        source = iter(packs)
        for number in range(1, len(packs) + 1):
            place = (number, len(packs))
            self.begin("data", pack=place)
            pack = next(source)
            self.begin(phase, pack=place)
            yield pack

    def backward(self) -> None:
        """The backward pass of the same pack begins."""
        self.begin("backward", pack=self.now.pack)

    def collective(self, name: str, axis: str, ranks: Sequence[int]) -> Collective:
        """The next collective of this name of these ranks."""
        key = (name, axis, tuple(ranks))
        self._begun[key] += 1
        return Collective(*key, self._begun[key])

    @contextmanager
    def waiting(self, collective: Collective) -> Iterator[None]:
        """Around whatever waits for other ranks: the collective and, since a device may only have queued it, the reading of its result."""
        before = self.now
        self._change(before._replace(collective=collective))
        yield
        self._change(before)

    def work_seconds(self) -> float:
        """Seconds in phases of own work since the last call, without those of waiting."""
        self._change(self.now)
        total = sum(self._seconds[phase] for phase in WORK)
        self._seconds.clear()
        return total

    def _change(self, moment: Moment) -> None:
        now = time.perf_counter()
        if self.now.collective is None:
            self._seconds[self.now.phase] += now - self._since
        self._since = now
        self.now = moment
        self.moves += 1


class Pending:
    """A collective that has begun and goes on beside."""

    def __init__(self, work: dist.Work, collective: Collective, activity: Activity) -> None:
        self._work, self._collective, self._activity = work, collective, activity

    def wait(self) -> None:
        """Return when it has ended; on a GPU, let what is computed next wait for it."""
        with self._activity.waiting(self._collective):
            self._work.wait()
