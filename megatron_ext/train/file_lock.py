"""One user of a directory at a time: a file in it that says who it is, and that it lives.

Locks of the kernel do not hold on every network file system, and outlive nothing, so the file itself is the lock. It is created by a hard
link, which is atomic on them too, and touched every few seconds. Who finds one

- of a process of its own machine asks the kernel whether that lives, and takes over at once if it does not (``kill -9``, a reboot);
- of another machine watches whether the file is touched, by no clock but its own, and takes over when it has not been for a while.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megatron_ext.atomic_io import write_json
from megatron_ext.errors import ConfigError
from megatron_ext.json_text import parse_json
from megatron_ext.report.status import boot, process_start
from megatron_ext.train.supervisor_log import say

TOUCH_SECONDS = 3.0
SILENT_SECONDS = 30.0
"""How long the lock of another machine must stay untouched until its process counts as dead. Network file systems may show changes late."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str
    """What must be the same for ``pid`` to mean the same: the start of the kernel and the name space of processes; empty if unknown."""
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
        started = process_start(os.getpid())
        return cls(socket.gethostname(), boot() or "", os.getpid(), str(started or ""), since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.since}"


class FileLock:
    """A context in which no other process holds the lock ``path``.

    Args:
        path: of the file, in a directory that exists on entering.
        refusal: what is said of the owner who lives.
        touch_seconds: between signs of life.
        silent_seconds: without a sign of life until a process of another machine counts as dead.

    Raises:
        ConfigError: on entering: somebody holds it, or the directory cannot be locked.
    """

    def __init__(
        self,
        path: Path,
        refusal: Callable[[Owner], str],
        touch_seconds: float = TOUCH_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self.path = path
        self._refusal = refusal
        self._touch_seconds, self._silent_seconds = touch_seconds, silent_seconds
        self._owner = Owner.me()
        self._ending = threading.Event()

    def __enter__(self) -> "FileLock":
        try:
            self._acquire()
        except OSError as error:
            raise ConfigError(
                f"run_dir: {self.path.parent} cannot be locked by {self.path.name}: {error.strerror}; accepted: a directory that can be "
                "written to"
            ) from error
        threading.Thread(target=self._touch, name=self.path.name, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        try:
            if self.holds():
                self.path.unlink(missing_ok=True)
        except OSError as away:
            # No reason to call failed what ended well, or to hide why it did not: a lock of a process that is gone keeps nobody out.
            say(f"{self.path} cannot be removed: {away.strerror}; who comes next takes it over once this process has ended")

    def holds(self) -> bool:
        """Whether the lock is still this process's. Raises OSError if it cannot be read."""
        return self.owner() == self._owner

    def owner(self) -> Owner | None:
        """Who holds it; None if nobody does, or the file names nobody. Raises OSError if it cannot be read."""
        return _owner(self.path)

    def _acquire(self) -> None:
        while not self._create():
            try:
                found = _read(self.path)
            except ValueError as error:
                raise ConfigError(f"{self.path} {error}; remove it if no run uses the directory") from error
            if found is None:
                continue
            if _lives(found, self.path, self._silent_seconds):
                raise ConfigError(self._refusal(found))
            self._take_over(found)
        self._clean()

    def _create(self) -> bool:
        """Whether there was no lock, and now is ours."""
        mine = self.path.with_name(f".{self.path.name}.{self._owner.token}")
        try:
            write_json(mine, asdict(self._owner))
            self._link(mine)
        except (FileExistsError, FileNotFoundError):
            # There is one, or a process that has just got it, and cleaned up.
            if not self.path.parent.is_dir():
                raise
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _link(self, file: Path) -> None:
        """Give ``file`` the name of the lock too, if nothing has it."""
        try:
            os.link(file, self.path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise ConfigError(
                f"run_dir: {self.path.parent} is on a file system without hard links ({self.path.name}: {error.strerror}); accepted: a "
                "directory on one that has them, by which runs keep each other out"
            ) from error

    def _clean(self) -> None:
        """Remove what processes left behind that were killed while they took the lock."""
        for pattern in (f".{self.path.name}.*", f"..{self.path.name}.*"):
            for path in self.path.parent.glob(pattern):
                path.unlink(missing_ok=True)

    def _take_over(self, dead: Owner) -> None:
        """Remove the lock of ``dead``. Of several that try only one moves it away; one that moved a newer lock puts it back.

        A third could come in between; the owner of the newer lock then finds that out by ``holds``.
        """
        aside = self.path.with_name(f".{self.path.name}.{self._owner.token}.dead")
        try:
            os.rename(self.path, aside)
            if _owner(aside) != dead:
                self._link(aside)
        except (FileNotFoundError, FileExistsError):
            pass
        aside.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ending.wait(self._touch_seconds):
            try:
                if self.holds():
                    os.utime(self.path)
            except OSError:
                # A file system that is away for a moment; the next touch may reach it, and ``holds`` has the last word.
                continue


def _owner(path: Path) -> Owner | None:
    """The owner that a lock names; None if there is no such file or it names none."""
    try:
        return _read(path)
    except ValueError:
        return None


def _read(path: Path) -> Owner | None:
    """The owner that a lock names; None if there is no such file. Raises ValueError if it names none."""
    try:
        owner = Owner(**parse_json(path.read_bytes()))
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError("is a link to nowhere and no lock of a run") from None
        return None
    except (IsADirectoryError, ValueError, TypeError) as error:
        raise ValueError("is no lock of a run") from error
    texts = (owner.host, owner.machine, owner.started, owner.since, owner.token)
    named = all(isinstance(text, str) and text.isprintable() for text in texts)
    if not (named and type(owner.pid) is int and 0 < owner.pid < 2**31):
        raise ValueError("is no lock of a run")
    return owner


def _lives(owner: Owner, path: Path, silent_seconds: float) -> bool:
    """Whether the owner of a lock lives, as far as can be seen from here."""
    if owner.machine and owner.machine == boot():
        started = process_start(owner.pid)
        return started is not None and owner.started == str(started)
    print(f"{path} is of {owner}: watching for {silent_seconds:.0f} s whether that lives", flush=True)
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
