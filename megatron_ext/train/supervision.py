"""What a supervisor concludes from what it sees: why a run failed, which hosts are lost, whether to start it again. No processes here."""

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_ext.json_text import parse_json

FINAL_ERRORS = ("ConfigError", "OptionError", "DataError")
"""A run that ends with one of these, and code 2, would end so again."""
EXACT_ERRORS = ("TrainingError", "NonFiniteError")
"""A run that resumes computes the same numbers: if it ends so again, and in the same words, it will the next time too."""
USER_ERROR_CODE = 2
LONGEST_PAUSE = 300.0
"""Seconds that pauses grow up to."""
IN_USE = "is used by process"
"""In the words of a run that finds another in its directory: one that was just given up, and ends, is gone at the next start."""
_END = re.compile(r"rank ended: (\{.*?\})")
_SILENT = re.compile(r"rank (\d+) on host (\S+) \(ranks .*?\) (?!failed with)(.*?)\. Rank \d+ on host")
_ERROR = re.compile(r"^((?:\w+\.)*(\w+(?:Error|Exception)): .*)")


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended; ``host`` is the supervisor's name for its host, ``code`` the exit code or minus the number of a signal."""

    rank: int
    host: str
    code: int


@dataclass(frozen=True)
class Failure:
    """Why a run did not end in good order."""

    host: str | None
    rank: int | None
    reason: str
    struck: bool = False
    """A rank was killed or fell silent, which may be the host's fault."""
    final: bool = False
    """It would fail so again."""
    exact: bool = False
    """It would fail so again unless a machine erred."""

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank}" + (f" on {self.host} " if self.host else " ")
        return who + self.reason


@dataclass(frozen=True)
class Attempt:
    """One start of a run that failed: the steps of the newest whole checkpoint before and after it."""

    before: int
    after: int
    failure: Failure

    @property
    def progressed(self) -> bool:
        """It brought a new checkpoint, and not another run that uses the directory."""
        return self.after > self.before and IN_USE not in self.failure.reason


@dataclass(frozen=True)
class Limits:
    """When restarting ends.

    Args:
        restarts: within the last ``window`` steps of progress.
        window: in optimizer steps, counted by checkpoints.
        stuck: restarts in a row that brought no new checkpoint.
        strikes: failures within ``window`` whose rank was killed or fell silent on one host, after which that host counts as lost.
        pause: seconds before a restart after a start that brought no new checkpoint; twice as long after each further one.
        hosts: seconds in which hosts that cannot be reached are waited for, if nothing fits on the others.
    """

    restarts: int = 10
    window: int = 1000
    stuck: int = 3
    strikes: int = 3
    pause: float = 5.0
    hosts: float = 1800.0


def rank_end(line: str, host: str) -> RankEnd | None:
    """What a line printed on ``host`` says of the end of a rank; None if nothing, also where it only looks like that."""
    found = _END.search(line)
    if found is None:
        return None
    try:
        end = parse_json(found[1])
        rank, code = end["rank"], end["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return RankEnd(rank, host, code) if type(rank) is type(code) is int else None


def blame(ends: Sequence[RankEnd], lines: Iterable[str], unreachable: Sequence[str], ranks_of: dict[str, int]) -> Failure:
    """Who failed first, and why.

    Args:
        ends: of ranks, in the order in which they were seen, without those that the supervisor ended.
        lines: the last that were printed.
        unreachable: hosts that do not answer.
        ranks_of: number of ranks of each host, in order.
    """
    lines = list(lines)
    if unreachable:
        return Failure(unreachable[0], None, f"{', '.join(unreachable)} cannot be reached")
    killed = next((end for end in ends if end.code < 0 and end.code != -signal.SIGTERM), None)
    if killed is not None:
        return Failure(killed.host, killed.rank, f"was killed by {_signal(killed)}", struck=True)
    silent = next((found for found in map(_SILENT.search, lines) if found), None)
    if silent is not None:
        rank = int(silent[1])
        return Failure(_host_of(rank, ranks_of), rank, silent[3], struck=True)
    first = next((end for end in ends if end.code != 0), None)
    error = next((found for found in map(_ERROR.match, lines) if found), None)
    said = f": {error[1][:500]}" if error else ""
    if first is None:
        return Failure(None, None, f"the launcher ended without the end of any rank{said}")
    ended = f"was ended by {_signal(first)}" if first.code < 0 else f"ended with code {first.code}"
    named = error[2] if first.code == USER_ERROR_CODE and error is not None and IN_USE not in error[1] else None
    return Failure(first.host, first.rank, ended + said, final=named in FINAL_ERRORS, exact=named in EXACT_ERRORS)


def _signal(end: RankEnd) -> str:
    try:
        return signal.Signals(-end.code).name
    except ValueError:
        return f"signal {-end.code}"


def _host_of(rank: int, ranks_of: dict[str, int]) -> str | None:
    for host, count in ranks_of.items():
        if rank < count:
            return host
        rank -= count
    return None


def verdict(attempts: Sequence[Attempt], limits: Limits) -> str | None:
    """Why the run is not to be started again after the last of ``attempts``, all of which failed; None if it is."""
    last = attempts[-1]
    if last.failure.final:
        return "it would fail so again"
    if last.failure.exact and len(attempts) > 1 and attempts[-2].failure.reason == last.failure.reason:
        return "it failed twice in the same words, and would again: a run that resumes computes the same numbers"
    if _idle(attempts) > limits.stuck:
        return f"{limits.stuck} restarts in a row brought no new checkpoint after that of step {last.after}"
    recent = _recent(attempts, limits.window)
    if len(recent) > limits.restarts:
        return f"{limits.restarts} restarts within {limits.window} steps were not enough"
    return None


def pause(attempts: Sequence[Attempt], limits: Limits) -> float:
    """Seconds to wait before the restart after the last of ``attempts``: none if it brought a new checkpoint."""
    idle = _idle(attempts)
    return next(islice(pauses(limits.pause), idle - 1, None)) if idle else 0.0


def pauses(first: float) -> Iterator[float]:
    """Seconds, twice as many each time, up to ``LONGEST_PAUSE``."""
    while True:
        yield min(first, LONGEST_PAUSE)
        first = min(2 * first, LONGEST_PAUSE)


def _idle(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts in a row brought no new checkpoint."""
    return next((count for count, each in enumerate(reversed(attempts)) if each.progressed), len(attempts))


def lost_hosts(attempts: Sequence[Attempt], limits: Limits, hosts: Sequence[str]) -> list[str]:
    """Those of ``hosts`` on which ranks died too often within the window. The last one that remains is never lost by this."""
    struck = [each.failure.host for each in _recent(attempts, limits.window) if each.failure.struck]
    lost = [host for host in hosts if struck.count(host) >= limits.strikes]
    return lost if len(lost) < len(hosts) else [host for host in lost if host != min(lost, key=struck.count)]


def _recent(attempts: Sequence[Attempt], window: int) -> list[Attempt]:
    return [each for each in attempts if each.after > attempts[-1].after - window] if attempts else []
