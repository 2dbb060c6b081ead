"""One run at a time in a run directory: a file that says who it is, and that it lives.

Locks of the kernel do not hold on every network file system, and outlive nothing, so the file itself is the lock. It is created by a hard
link, which is atomic on them too, and touched every few seconds. A run that finds one

- of a process of its own machine asks the kernel whether that lives, and takes over at once if it does not (``kill -9``, a reboot);
- of another machine watches whether the file is touched, by no clock but its own, and takes over when it has not been for a while.

A run that was only asleep, and lost its lock so, finds that out before it writes to its checkpoints the next time, and ends.
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megatron_ext.atomic_io import write_json
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.parallel.world import World

LOCK_FILE = "lock.json"
TOUCH_SECONDS = 3.0
SILENT_SECONDS = 30.0
"""How long the lock of another machine must stay untouched until its run counts as dead. Network file systems may show a change late."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str
    """What must be the same for ``pid`` to mean the same: the start of the kernel and the name space of processes."""
    pid: int
    started: str
    """When the process was started, in ticks of the kernel since its own start: numbers of processes are used again."""
    since: str
    """When the lock was taken, for people."""
    token: str

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or "", since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.since}"


class RunLock:
    """A context in which no other run uses ``run_dir``. All ranks enter it; rank 0 holds the lock.

    Args:
        run_dir: exists on rank 0.
        world: all ranks.
        touch_seconds: between signs of life.
        silent_seconds: without a sign of life until a run of another machine counts as dead.

    Raises:
        ConfigError: on all ranks, on entering: names the run that uses the directory.
    """

    def __init__(self, run_dir: Path, world: World, touch_seconds: float = TOUCH_SECONDS, silent_seconds: float = SILENT_SECONDS) -> None:
        self._path = run_dir / LOCK_FILE
        self._world = world
        self._touch_seconds, self._silent_seconds = touch_seconds, silent_seconds
        self._owner = Owner.me()
        self._ending = threading.Event()

    def __enter__(self) -> "RunLock":
        error = None
        if self._world.is_main:
            try:
                self._acquire()
            except (ConfigError, OSError) as refused:
                error = str(refused)
        if error := self._world.on_main(error):
            raise ConfigError(error)
        if self._world.is_main:
            threading.Thread(target=self._touch, name="run lock", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        if self._world.is_main and self._holds():
            self._path.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Raise CheckpointError if another run has taken over. For rank 0."""
        if not self._holds():
            raise CheckpointError(
                f"{self._path} is no longer this run's, but of {_read(self._path) or 'nobody'}: another run took over while this one gave "
                "no sign of life, or somebody removed the file. Nothing more is written to the checkpoints"
            )

    def _holds(self) -> bool:
        return _read(self._path) == self._owner

    def _acquire(self) -> None:
        while not self._create():
            found = _read(self._path)
            if found is None:
                if self._path.exists():
                    raise ConfigError(f"{self._path} is no lock of a run; remove it if no run uses the directory")
                continue
            if _lives(found, self._path, self._silent_seconds):
                raise ConfigError(
                    f"run_dir: {self._path.parent} is used by {found}; accepted: a directory that no run uses. Stop that run first "
                    "(tools/stop.py), or give this one another run_dir"
                )
            self._take_over(found)
        self._clean()

    def _create(self) -> bool:
        """Whether there was no lock, and now is ours."""
        mine = self._path.with_name(f".{LOCK_FILE}.{self._owner.token}")
        write_json(mine, asdict(self._owner))
        try:
            os.link(mine, self._path)
        except (FileExistsError, FileNotFoundError):
            # There is one, or a run that has just got it cleaned up.
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _clean(self) -> None:
        """Remove what runs left behind that were killed while they took the lock."""
        for pattern in (f".{LOCK_FILE}.*", f"..{LOCK_FILE}.*"):
            for path in self._path.parent.glob(pattern):
                path.unlink(missing_ok=True)

    def _take_over(self, dead: Owner) -> None:
        """Remove the lock of ``dead``. Of several that try only one moves it away; one that moved a newer lock puts it back.

        A third could come in between; the owner of the newer lock then finds that out in ``confirm``.
        """
        aside = self._path.with_name(f".{LOCK_FILE}.{self._owner.token}.dead")
        try:
            os.rename(self._path, aside)
            if _read(aside) != dead:
                os.link(aside, self._path)
        except (FileNotFoundError, FileExistsError):
            pass
        aside.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ending.wait(self._touch_seconds):
            try:
                if self._holds():
                    os.utime(self._path)
            except OSError:
                # A file system that is away for a moment; the next touch may reach it, and ``confirm`` has the last word.
                continue


def _read(path: Path) -> Owner | None:
    """The owner that a lock names; None if there is no such file or it names none."""
    try:
        return Owner(**json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _lives(owner: Owner, path: Path, silent_seconds: float) -> bool:
    """Whether the owner of a lock lives, as far as can be seen from here."""
    if owner.machine and owner.machine == _machine():
        return owner.started == _started(owner.pid)
    print(f"{path} is of {owner}: watching for {silent_seconds:.0f} s whether that run lives", flush=True)
    end, before = time.monotonic() + silent_seconds, _touched(path)
    while time.monotonic() < end:
        time.sleep(min(1.0, silent_seconds / 10))
        if (now := _touched(path)) != before:
            return now is not None
    return False


def _touched(path: Path) -> int | None:
    """When the file was touched last. Opened for it: network file systems ask the server then, and may remember otherwise."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Empty where the kernel does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process was started, in ticks of the kernel; None if there is none, or nothing of it is left but its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
