"""Start a run, and start it again when it fails: on the hosts that remain, from the last whole checkpoint."""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from megatron_ext.checkpoint.choose import Choice, newest_whole
from megatron_ext.checkpoint.directory import LATEST
from megatron_ext.config import RunConfig, load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.build import prepare, run_shape
from megatron_ext.train.console import say
from megatron_ext.train.elastic_grid import RULE, Layout, choose_grid
from megatron_ext.train.file_lock import FileLock, Owner
from megatron_ext.train.forking import ForkedRun
from megatron_ext.train.launching import LaunchedRun, RemoteShell, free_port, is_local, launch_commands
from megatron_ext.train.metrics import METRICS_FILE
from megatron_ext.train.started_run import StartedRun
from megatron_ext.train.stopping import STOP_FILE, request_stop
from megatron_ext.train.supervision import Attempt, Failure, Limits, blame, lost_hosts, pause, pauses, verdict
from megatron_ext.train.supervisor_log import SupervisorLog, last_step
from megatron_ext.train.trainer import CHECKPOINTS

LOCK_FILE = "supervisor_lock.json"
SLEEP_SECONDS = 0.5
"""How long a signal waits at most while the supervisor waits."""


@dataclass(frozen=True)
class Supervised:
    """What is to be run, where, and how often."""

    config: str
    overrides: tuple[str, ...]
    hosts: dict[str, int]
    """Ranks that each host has room for."""
    script: str
    """What each rank runs."""
    guard: str
    """What runs ``script`` for the launcher, to say how it ended."""
    fork: bool = False
    """Ranks are forks of one process, without the launcher; on this host only."""
    remote: RemoteShell = field(default_factory=RemoteShell)
    limits: Limits = field(default_factory=Limits)
    grace: float = 10.0
    """Seconds that the others have to end after a rank failed."""
    port: int = 29500
    """On the first host, where it is not this one; the next start takes the next."""


@dataclass(frozen=True)
class Clock:
    """Time as the supervisor spends it between starts, in seconds."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class StopSignals:
    """SIGTERM and SIGINT to the supervisor: the first asks the run to end in good order, the second kills it."""

    count: int = 0

    def __post_init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Supervisor:
    """One supervised run.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be used, before anything is started.
    """

    def __init__(self, what: Supervised, clock: Clock | None = None) -> None:
        self.what, self.clock = what, clock or Clock()
        self._configure: Callable[[list[str]], RunConfig] = lambda more: load_config(what.config, [*what.overrides, *more])
        self.config = self._configure([])
        self.model = prepare(self.config).model
        run_shape(self.config, self.model, sum(what.hosts.values()))
        if what.fork and not all(map(is_local, what.hosts)):
            raise ConfigError(f"hosts: {list(what.hosts)}; accepted where ranks are forked: this one")
        self.run_dir = Path(self.config.run_dir)
        self.checkpoints = self.run_dir / CHECKPOINTS
        self.log = SupervisorLog(self.run_dir)
        self.signals = StopSignals()
        self.attempts: list[Attempt] = []
        self.lost: list[str] = []
        self.unreachable: list[str] = []
        self._lock = FileLock(self.run_dir / LOCK_FILE, self._refusal)
        self._latest_before = self._latest()

    def run(self) -> int:
        """Until the run ends in good order (0), or is given up: the code of its last failure, at least 1.

        Raises:
            ConfigError: another supervisor keeps a run in this directory going.
        """
        with self._lock:
            return self._keep_running()

    def _refusal(self, owner: Owner) -> str:
        return (
            f"run_dir: {self.run_dir} is supervised by {owner}; accepted: a directory in which no other supervisor keeps a run going. Stop "
            "that run first (tools/stop.py), or give this one another run_dir"
        )

    def _keep_running(self) -> int:
        layout: Layout | None = None
        while True:
            choice = newest_whole(self.checkpoints)
            try:
                before, layout = layout, self._layout_in_time()
                resume = self._resume(choice)
            except ConfigError as error:
                return self._give_up("it was asked to stop" if self.signals.count else str(error), 1)
            self._say_start(layout, before, choice, resume)
            code, failure = self._attempt(layout, resume)
            if failure is None:
                self.log.event("end", "the run ended in good order", step=newest_whole(self.checkpoints).step)
                return 0
            self.attempts.append(Attempt(choice.step, newest_whole(self.checkpoints).step, failure))
            self.log.event("failure", f"{failure}", **asdict(failure), code=code, **self._steps(), grid=asdict(layout.shape))
            if reason := self._reason_to_end() or self._pause():
                return self._give_up(reason, code)

    def _reason_to_end(self) -> str | None:
        """Why the run is not to be started again after it failed; None if it is."""
        if self.signals.count:
            return "it was asked to stop"
        return self._lost_lock() or verdict(self.attempts, self.what.limits)

    def _lost_lock(self) -> str | None:
        """Whose the lock is, if it is known to be no longer this supervisor's."""
        try:
            if self._lock.holds():
                return None
            return f"{self._lock.path} is no longer this supervisor's, but of {self._lock.owner() or 'nobody'}"
        except OSError as error:
            # What keeps the lock from being read may be what made the run fail, and is what a supervisor is there to outlast.
            self.log.once(f"{self._lock.path} cannot be read: {error.strerror}; it counts as still this supervisor's")
            return None

    def _pause(self) -> str | None:
        """Give what made the run fail time to end, if there is no new checkpoint; returns why the run is not to be started then."""
        seconds = pause(self.attempts, self.what.limits)
        if seconds > 0:
            self.log.event("pause", f"no new checkpoint: {seconds:.0f} s until the next start", seconds=seconds)
            self._sleep(seconds)
        return self._reason_to_end()

    def _sleep(self, seconds: float) -> None:
        end = self.clock.now() + seconds
        while (left := end - self.clock.now()) > 0 and not self.signals.count:
            self.clock.sleep(min(left, SLEEP_SECONDS))

    def _layout_in_time(self) -> Layout:
        """The grid; hosts without which there is none are waited for, with growing pauses. Raises ConfigError if they do not come."""
        begin = self.clock.now()
        for seconds in pauses(max(1.0, self.what.limits.pause)):
            try:
                return self._layout()
            except ConfigError as error:
                left = begin + self.what.limits.hosts - self.clock.now()
                if not self.unreachable or left <= 0 or self.signals.count:
                    raise
                seconds, hosts = min(seconds, left), ", ".join(self.unreachable)
                message = f"{error}; waiting {seconds:.0f} s for {hosts}, {left:.0f} s in all"
                self.log.event("wait", message, hosts=self.unreachable, seconds=seconds)
                self._sleep(seconds)
        raise AssertionError("pauses do not end")

    def _layout(self) -> Layout:
        """The grid on the hosts that are there. Raises ConfigError if there is none."""
        struck = lost_hosts(self.attempts, self.what.limits, list(self.what.hosts))
        self.unreachable = self.what.remote.unreachable(list(self.what.hosts))
        reasons = dict.fromkeys(struck, f"{self.what.limits.strikes} failures on it")
        reasons |= dict.fromkeys(self.unreachable, "it cannot be reached")
        for host in [host for host in reasons if host not in self.lost]:
            self.log.event("host_lost", f"host {host} counts as lost: {reasons[host]}", host=host, reason=reasons[host])
        for host in [host for host in self.lost if host not in reasons]:
            self.log.event("host_back", f"host {host} is there again", host=host)
        self.lost = list(reasons)
        remaining = {host: slots for host, slots in self.what.hosts.items() if host not in reasons}
        return choose_grid(self._configure, self.model, remaining)

    def _resume(self, choice: Choice) -> list[str]:
        """Overrides that say where the next start resumes from. Raises ConfigError if checkpoints were saved and none is whole."""
        for reason in choice.passed_over:
            self.log.event("passed_over", f"a checkpoint is passed over: {reason}", reason=reason)
        asked = self.config.checkpoint.resume
        if asked != "auto" and self._latest() == self._latest_before:
            return []
        if choice.passed_over and choice.path is None:
            raise ConfigError("no checkpoint is whole; start with checkpoint.resume=never to begin again at step 0")
        if choice.passed_over:
            return [f"checkpoint.resume={choice.path}", "checkpoint.branch_from=null"]
        return [] if asked == "auto" else ["checkpoint.resume=auto"]

    def _latest(self) -> tuple[int, int] | None:
        """Tells one state of the pointer to the latest checkpoint from another."""
        path = self.checkpoints / LATEST
        if not path.exists():
            return None
        state = path.stat()
        return state.st_ino, state.st_mtime_ns

    def _say_start(self, layout: Layout, before: Layout | None, choice: Choice, resume: list[str]) -> None:
        where = "from the beginning" if choice.path is None else f"from {choice.path}"
        if self.config.checkpoint.resume != "auto" and self._latest() == self._latest_before:
            where = f"with checkpoint.resume={self.config.checkpoint.resume}"
        rule = f" ({RULE})" if layout.overrides else ""
        fields = {"step": choice.step, "checkpoint": str(choice.path) if choice.path else None, "overrides": [*layout.overrides, *resume]}
        fields |= {"hosts": layout.ranks, "grid": asdict(layout.shape)}
        if before is None:
            self.log.event("start", f"start {where}: {layout}{rule}", **fields)
            return
        failure = self.attempts[-1].failure
        because = {"rank": failure.rank, "host": failure.host, "reason": failure.reason}
        change = f"; the grid was {before.shape}" if before.shape != layout.shape else ""
        message = f"restart {len(self.attempts)} {where}: {layout}{change}{rule}"
        self.log.event("restart", message, **because, **fields, grid_before=asdict(before.shape))

    def _attempt(self, layout: Layout, resume: list[str]) -> tuple[int, Failure | None]:
        """Start the run and wait for its end: its code, and why it failed, or None."""
        run = self._start(layout, ["--config", self.what.config, *self.what.overrides, *layout.overrides, *resume])
        stopping = False

        def tick() -> bool:
            nonlocal stopping
            if self.signals.count and not stopping:
                stopping = True
                self.log.event("stop", "asked to stop: the run saves at the end of its step and ends")
            if stopping and self.run_dir.is_dir():
                # Again and again: a run that is only starting forgets requests of before.
                self._request_stop()
            return self.signals.count > 1

        code = run.wait(self.what.grace, tick)
        if stopping:
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        if code == 0:
            return 0, None
        return code, blame(run.ends, run.lines, self.what.remote.unreachable(list(layout.ranks)), layout.ranks)

    def _request_stop(self) -> None:
        try:
            request_stop(self.run_dir)
        except OSError as error:
            self.log.once(f"the run cannot be asked to stop ({error}); a second signal kills it")

    def _start(self, layout: Layout, arguments: list[str]) -> StartedRun:
        what = self.what
        local = all(map(is_local, layout.ranks))
        port = free_port() if local else what.port + len(self.attempts)
        if what.fork:
            return ForkedRun(layout.shape.size, port, [what.script, *arguments], say)
        commands = launch_commands(layout.ranks, port, [what.guard, what.script, *arguments])
        return LaunchedRun({host: what.remote.on(host, command) for host, command in commands.items()}, say)

    def _steps(self) -> dict[str, int]:
        """Where the run has come to, and what is saved of it."""
        attempt = self.attempts[-1]
        return {"step": last_step(self.run_dir / METRICS_FILE, self.log.once), "saved_before": attempt.before, "saved": attempt.after}

    def _give_up(self, reason: str, code: int) -> int:
        saved = newest_whole(self.checkpoints)
        where = "no checkpoint was saved" if saved.path is None else f"the last whole checkpoint is {saved.path}"
        self.log.event("give_up", f"the run is not started again: {reason}; {where}", reason=reason, step=saved.step)
        return code if 0 < code < 256 else 1
