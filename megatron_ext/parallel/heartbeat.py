"""Every rank says that it lives and what it does; when one dies, fails or hangs, all others end and say which it was.

Without it the others would wait in a collective until its timeout, and then blame the collective.
"""

import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ext.parallel.activity import Collective
from megatron_ext.parallel.hang import HangWatch, Report
from megatron_ext.parallel.world import World

VERDICT = "verdict"
GRACE_SECONDS = 1.0
"""How long the others wait before they speak, so that the failing rank's own traceback comes first."""
LAST_WORDS_SECONDS = 30.0
"""How long a rank that is to end may take to say why."""
STACK_LINES = 24
"""The last of a stack that are printed; the rank's log has all."""


class Heartbeat:
    """A thread on each rank that beats into a store on rank 0 and looks for a verdict there; rank 0 also looks at all beats.

    A beat says what the thread that made this object does, as the world's activity knows it. Where no rank gets on any more, the ranks that
    the others wait for are named, with their stacks.

    A rank that has not been heard for ``timeout`` seconds, or a store that does not answer for so long, ends the process of every rank that
    is left with exit code 1: nothing gentler reaches a thread that waits in a collective. With one rank nothing is started. Seconds are
    counted in rounds of the thread: when all ranks were frozen and go on, nobody is accused of the time that passed.

    Args:
        world: all ranks; all make one.
        timeout: seconds of silence after which a rank counts as dead.
        hangs: judges what ranks say, on rank 0; None: nobody does.
        tell: called on one rank with the name of what ended the run (``silence``, ``hang``) and what is known about it.
    """

    def __init__(
        self, world: World, timeout: float, hangs: HangWatch | None = None, tell: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self._world, self._timeout, self._hangs, self._tell = world, timeout, hangs, tell
        self._interval = min(1.0, timeout / 5, hangs.limit() / 20 if hangs else timeout)
        self._trains = threading.get_ident()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._turns = 0
        if world.size == 1:
            return
        self._hosts: list[str] = world.gather(socket.gethostname())
        self._store = self._connect()
        self._store.set(_beat_key(world.rank), self._beat(0))
        world.barrier()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        if not world.is_main:
            threading.Thread(target=self._watch_store, name="heartbeat of the store", daemon=True).start()

    def fail(self, error: BaseException) -> bool:
        """Tell all ranks that this one raised, or, if another had done so before, say which: its end is what this rank fell over.

        The caller then raises the error, and prints it where it always would. Returns whether this rank was the first.
        """
        if self._thread is None:
            return True
        self._ending.set()
        first_line = (str(error).splitlines() or [""])[0][:500]
        what = f"failed with {type(error).__name__}: {first_line}; its own traceback says more ({self._world.activity.now})"
        try:
            first = self._store.compare_set(VERDICT, "", json.dumps({"rank": self._world.rank, "what": what}))
        except Exception as unreachable:
            first = json.dumps({"rank": 0, "what": f"cannot be reached ({type(unreachable).__name__})"})
        verdict = json.loads(first)
        if verdict["rank"] != self._world.rank:
            print(self._describe(verdict), file=sys.stderr, flush=True)
        return verdict["rank"] == self._world.rank

    def close(self) -> None:
        """End in good order. All ranks call it."""
        if self._thread is not None:
            # Still watched: a rank that does not come to its end is named.
            self._world.barrier()
            # Set on every rank before any can be through the barrier and take its store away: from here silence is no alarm.
            self._ending.set()
            self._world.barrier()
            self._thread.join()

    def _connect(self) -> dist.TCPStore:
        """The store, served by rank 0 on a free port."""
        timeout = timedelta(seconds=self._timeout)
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self._world.is_main:
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = self._world.on_main(store.port if self._world.is_main else None)
        return store if self._world.is_main else dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def _run(self) -> None:
        beats = 0
        heard = dict.fromkeys(range(self._world.size), ("", 0.0))
        while not self._ending.wait(self._interval):
            beats += 1
            try:
                self._store.set(_beat_key(self._world.rank), self._beat(beats))
                if self._world.is_main:
                    self._listen(heard, beats * self._interval)
                verdict = json.loads(self._store.get(VERDICT)) if self._store.check([VERDICT]) else None
            except Exception as error:
                verdict = {"rank": 0, "ranks": [0], "event": "silence", "what": f"cannot be reached ({type(error).__name__})"}
            self._turns += 1
            if verdict is not None and not self._ending.is_set():
                self._end(verdict)

    def _watch_store(self) -> None:
        """End if no answer comes from rank 0. A frozen process keeps its connections, and the store's own timeout does not see that.

        Counts its own rounds, not seconds: a process that was itself frozen accuses nobody when it goes on.
        """
        rounds, seen = 0, self._turns
        while not self._ending.wait(self._interval):
            rounds, seen = (rounds + 1, seen) if self._turns == seen else (0, self._turns)
            if rounds * self._interval > self._timeout:
                what = f"cannot be reached (no answer for {self._timeout:.0f} s, train.heartbeat_timeout)"
                self._end({"rank": 0, "ranks": [0], "event": "silence", "what": what})

    def _beat(self, number: int) -> str:
        """A beat of this rank: no two are alike."""
        report = Report.of(self._world.activity)
        if report.moment.phase and report.moment.collective is None and (name := _torch_collective(self._trains)):
            report = Report(report.moves, report.moment._replace(collective=Collective(name, "torch.distributed", (), 0)))
        return f"{number} {report.encode()}"

    def _listen(self, heard: dict[int, tuple[str, float]], now: float) -> None:
        """Note who has beaten since the last time, and judge who has been silent too long or holds the others up."""
        values = self._store.multi_get([_beat_key(rank) for rank in heard])
        for rank, value in enumerate(values):
            if value.decode() != heard[rank][0]:
                heard[rank] = (value.decode(), now)
        reports = {rank: Report.decode(beat.split(" ", 1)[1]) for rank, (beat, _) in heard.items()}
        silent = max(heard, key=lambda rank: now - heard[rank][1])
        seconds = now - heard[silent][1]
        if seconds > self._timeout:
            what = f"has not been heard for {seconds:.0f} s (train.heartbeat_timeout is {self._timeout:.0f} s): {reports[silent].moment}"
            self._judge({"rank": silent, "ranks": [silent], "event": "silence", "what": what})
        elif self._hangs is not None:
            quiet = [rank for rank, (_, when) in heard.items() if now - when > max(2.0, 5 * self._interval)]
            if hang := self._hangs.judge(reports, now, quiet):
                what = f"{hang.what} (train.hang_timeout; the limit is {hang.limit:.0f} s)"
                self._judge({"rank": hang.ranks[0], "ranks": hang.ranks, "event": "hang", "what": what})

    def _judge(self, verdict: dict[str, Any]) -> None:
        if not self._store.check([VERDICT]):
            self._store.set(VERDICT, json.dumps(verdict))

    def _end(self, verdict: dict[str, Any]) -> None:
        """Say why, as far as it can be said, and end the process; also if the disk is full, the console gone, or a write never returns."""
        deadline = threading.Timer(LAST_WORDS_SECONDS, os._exit, (1,))
        deadline.daemon = True
        _attempt(deadline.start)
        if "ranks" in verdict:
            _attempt(self._log_stack, verdict)
            _attempt(self._print_stack, verdict)
        if self._ending.wait(GRACE_SECONDS):
            deadline.cancel()
            return
        try:
            _attempt(self._tell_event, verdict)
            _attempt(self._print_verdict, verdict)
            _attempt(sys.stdout.flush)
        finally:
            os._exit(1)

    def _log_stack(self, verdict: dict[str, Any]) -> None:
        """Log where this rank stands."""
        logging.getLogger(__name__).error(self._describe(verdict), extra={"details": {"stack": self._stack()}})

    def _print_stack(self, verdict: dict[str, Any]) -> None:
        """Print where this rank stands, if the others wait for it."""
        if self._world.rank in verdict["ranks"]:
            last = "\n".join(self._stack()[-STACK_LINES:])
            print(f"rank {self._world.rank} stands here ({self._world.activity.now}):\n{last}", file=sys.stderr, flush=True)

    def _stack(self) -> list[str]:
        """Lines of the stack of the thread that trains."""
        return "".join(traceback.format_stack(sys._current_frames()[self._trains])).splitlines()

    def _tell_event(self, verdict: dict[str, Any]) -> None:
        """Let the run know what ended it; one rank does."""
        if self._tell is not None and "event" in verdict and self._world.rank == int(verdict["rank"] == 0):
            self._tell(verdict["event"], {key: verdict[key] for key in ("rank", "ranks", "what")} | {"host": self._hosts[verdict["rank"]]})

    def _print_verdict(self, verdict: dict[str, Any]) -> None:
        """Print what ended the run; one rank of each host does."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(self._describe(verdict), file=sys.stderr, flush=True)

    def _describe(self, verdict: dict[str, Any]) -> str:
        rank, me = verdict["rank"], self._world.rank
        others = [number for number, name in enumerate(self._hosts) if name == self._hosts[rank]]
        return (
            f"rank {rank} on host {self._hosts[rank]} (ranks {others}) {verdict['what']}. Rank {me} on host {self._hosts[me]} ends. "
            "Start the same command on the hosts that remain to go on from the last checkpoint."
        )


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _attempt(action: Callable[..., None], *arguments: Any) -> None:
    """Do what may fail, and say so where anything can still be said."""
    try:
        action(*arguments)
    except Exception:
        with suppress(Exception):
            traceback.print_exc()


def _torch_collective(thread: int) -> str:
    """The function of torch.distributed that a thread of this process is in, empty if it is in none: of collectives that others began."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
            return frame.f_code.co_name
        frame = frame.f_back
    return ""
