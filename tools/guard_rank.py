#!/usr/bin/env python3
"""Run one rank of a supervised run and say how it ended; ``tools/supervise.py`` puts one in the place of every rank.

    python tools/guard_rank.py SCRIPT [argument ...]

The launcher does not say which of its ranks ended first, nor by which signal. This does, in one line. And it kills its rank as soon as its
standard input ends: the supervisor holds the other end, so that no rank outlives it, on whatever host. Only the standard library: there is
one of these beside every rank.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def main(command: list[str]) -> int:
    """Run ``python command`` to its end; the result is its exit code, or 128 and the number of the signal that ended it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # The launcher signals the rank itself. A handler, because the rank would inherit that a signal is ignored.
        signal.signal(number, lambda number, frame: None)
    rank = subprocess.Popen([sys.executable, "-u", *command], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    threading.Thread(target=_kill_at_end_of_input, args=(rank,), daemon=True).start()
    code = rank.wait()
    end = {"rank": int(os.environ["RANK"]), "host": socket.gethostname(), "code": code}
    # One write of a whole line, so that the ranks' lines do not mix.
    os.write(1, f"rank ended: {json.dumps(end)}\n".encode())
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def _kill_at_end_of_input(rank: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    rank.kill()


if __name__ == "__main__":
    # Not sys.exit: the thread that waits for input would be waited for.
    code = main(sys.argv[1:])
    os._exit(code)
