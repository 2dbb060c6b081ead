"""Every rank says that it lives; when one dies or fails, all others end and say which it was.

Without it the others would wait in a collective until its timeout, and then blame the collective.
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ext.parallel.world import World

VERDICT = "verdict"
GRACE_SECONDS = 1.0
"""How long the others wait before they speak, so that the failing rank's own traceback comes first."""


class Heartbeat:
    """A thread on each rank that beats into a store on rank 0 and looks for a verdict there; rank 0 also looks at all beats.

    A rank that has not been heard for ``timeout`` seconds, or a store that does not answer for so long, ends the process of every rank that
    is left with exit code 1: nothing gentler reaches a thread that waits in a collective. With one rank nothing is started.

    Args:
        world: all ranks; all make one.
        timeout: seconds of silence after which a rank counts as dead.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._interval = min(1.0, timeout / 5)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size == 1:
            return
        self._hosts: list[str] = world.gather(socket.gethostname())
        self._store = self._connect()
        self._store.set(_beat_key(world.rank), "0")
        world.barrier()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one raised, or, if another had done so before, say which: its end is what this rank fell over.

        The caller then raises the error, and prints it where it always would.
        """
        if self._thread is None:
            return
        self._ending.set()
        first_line = (str(error).splitlines() or [""])[0][:500]
        what = f"failed with {type(error).__name__}: {first_line}; its own traceback says more"
        try:
            first = self._store.compare_set(VERDICT, "", json.dumps({"rank": self._world.rank, "what": what}))
        except Exception as unreachable:
            first = json.dumps({"rank": 0, "what": f"cannot be reached ({type(unreachable).__name__})"})
        verdict = json.loads(first)
        if verdict["rank"] != self._world.rank:
            print(self._describe(verdict), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End in good order. All ranks call it."""
        if self._thread is not None:
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
        heard = dict.fromkeys(range(self._world.size), ("0", time.monotonic()))
        while not self._ending.wait(self._interval):
            beats += 1
            try:
                self._store.set(_beat_key(self._world.rank), str(beats))
                if self._world.is_main:
                    self._listen(heard)
                verdict = json.loads(self._store.get(VERDICT)) if self._store.check([VERDICT]) else None
            except Exception as error:
                verdict = {"rank": 0, "what": f"cannot be reached ({type(error).__name__})"}
            if verdict is not None and not self._ending.is_set():
                self._end(verdict)

    def _listen(self, heard: dict[int, tuple[str, float]]) -> None:
        """Note who has beaten since the last time, and judge who has been silent too long."""
        now = time.monotonic()
        values = self._store.multi_get([_beat_key(rank) for rank in heard])
        for rank, value in enumerate(values):
            if value.decode() != heard[rank][0]:
                heard[rank] = (value.decode(), now)
        silent = max(heard, key=lambda rank: now - heard[rank][1])
        seconds = now - heard[silent][1]
        if seconds > self._timeout and not self._store.check([VERDICT]):
            what = f"has not been heard for {seconds:.0f} s (train.heartbeat_timeout is {self._timeout:.0f} s)"
            self._store.set(VERDICT, json.dumps({"rank": silent, "what": what}))

    def _end(self, verdict: dict[str, Any]) -> None:
        if self._ending.wait(GRACE_SECONDS):
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(self._describe(verdict), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def _describe(self, verdict: dict[str, Any]) -> str:
        rank, me = verdict["rank"], self._world.rank
        others = [number for number, name in enumerate(self._hosts) if name == self._hosts[rank]]
        return (
            f"rank {rank} on host {self._hosts[rank]} (ranks {others}) {verdict['what']}. Rank {me} on host {self._hosts[me]} ends. "
            "Start the same command on the hosts that remain to go on from the last checkpoint."
        )


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
