"""The faults of ``tools/soak.py``: which comes when, and how it is done to a run."""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soak_run import SoakRun

KINDS = ("kill_rank", "kill_all", "stop_rank", "disk_full", "damage", "sigterm")
FULL_SECONDS = 60.0
"""How long a disk stays full if nothing is said about it."""


@dataclass(frozen=True)
class Fault:
    """One fault: ``rank`` it is done to, after ``gap`` seconds of training or while the first save after them is under way, ``variant``."""

    kind: str
    rank: int
    gap: float
    during_save: bool
    variant: float
    """In [0, 1): which file of a checkpoint, which byte, flipped or cut off."""


def schedule(seed: int, kinds: tuple[str, ...], gap: float, ranks: int = 4) -> Iterator[Fault]:
    """Faults without end. Each kind comes once a round, in an order of its own."""
    draw = random.Random(seed)
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            yield Fault(kind, draw.randrange(ranks), draw.uniform(0, gap), draw.random() < 0.4, draw.random())


@dataclass(frozen=True)
class Done:
    """What was done, in words; and whether the run met it."""

    what: str
    met: bool = True


def inject(fault: Fault, run: "SoakRun") -> Done:
    """Do it."""
    done = INJECTORS[fault.kind](fault, run)
    return replace(done, what=f"{done.what} during a save") if fault.during_save and fault.kind.startswith(("kill", "stop")) else done


def _kill_rank(fault: Fault, run: "SoakRun") -> Done:
    os.kill(run.ranks()[fault.rank], signal.SIGKILL)
    return Done(f"rank {fault.rank} killed")


def _kill_all(fault: Fault, run: "SoakRun") -> Done:
    run.kill()
    return Done("supervisor and all ranks killed")


def _stop_rank(fault: Fault, run: "SoakRun") -> Done:
    os.kill(run.ranks()[fault.rank], signal.SIGSTOP)
    return Done(f"rank {fault.rank} frozen by SIGSTOP")


def _sigterm(fault: Fault, run: "SoakRun") -> Done:
    if fault.variant < 0.5:
        os.kill(run.ranks()[fault.rank], signal.SIGTERM)
        return Done(f"SIGTERM to rank {fault.rank}")
    run.terminate()
    return Done("SIGTERM to the supervisor")


def _damage(fault: Fault, run: "SoakRun") -> Done:
    """All ranks are killed first, so that nothing is saved on top of the damage."""
    for pid in run.ranks().values():
        os.kill(pid, signal.SIGKILL)
    newest = run.newest_whole()
    assert newest is not None, "the run has saved"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = files[int(fault.variant * len(files))]
    size, digits = file.stat().st_size, int(fault.variant * 1e6)
    if digits % 2:
        os.truncate(file, size // 2)
        return Done(f"{file.relative_to(newest.parent)} cut off, all ranks killed")
    flip_bit(file, digits % size)
    return Done(f"one bit of {file.relative_to(newest.parent)} flipped, all ranks killed")


def flip_bit(file: Path, place: int) -> None:
    """Change the lowest bit of one byte."""
    with open(file, "r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))


def _disk_full(fault: Fault, run: "SoakRun") -> Done:
    """Fill the disk of the checkpoints until the run says so, and empty it again."""
    ballast, said = run.checkpoints / "ballast", run.said_disk_full()
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    end = time.monotonic() + FULL_SECONDS
    while run.said_disk_full() == said and time.monotonic() < end:
        time.sleep(0.05)
    noticed = run.said_disk_full() > said
    ballast.unlink()
    return Done("disk full until " + ("a save failed" if noticed else f"{FULL_SECONDS:.0f} s were over; no save failed"), noticed)


INJECTORS = {
    "kill_rank": _kill_rank,
    "kill_all": _kill_all,
    "stop_rank": _stop_rank,
    "disk_full": _disk_full,
    "damage": _damage,
    "sigterm": _sigterm,
}
