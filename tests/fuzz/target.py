"""What is fuzzed, and what one case must show: it loads and is consistent, or it is refused by a named error that names its file."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from megatron_ext.errors import MegatronExtError
from tests.fuzz.mutations import Mutator

MEMORY_BYTES = 1 << 30
"""What a case may take beyond what the process has."""
CPU_SECONDS = 20.0
LONGEST_MESSAGE = 20_000


class Hang(BaseException):
    """A case took too long. No ``except Exception`` of the code under test catches it."""


@dataclass(frozen=True)
class Target:
    """A format with valid files to spoil, and the code that reads it."""

    make: Callable[[Path], None]
    """Writes a valid instance into an empty folder."""
    mutators: Mapping[str, Mutator]
    """Files that are spoilt, relative to the folder."""
    load: Callable[[Path, Random], None]
    """Reads the folder and checks that what it read is consistent; raises a MegatronExtError where it refuses."""


class Instance:
    """Files of a target in a folder, valid between cases."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder = target, folder
        target.make(folder)
        self._valid = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def load(self, random: Random) -> str:
        """What became of the files as they lie there: ``loaded``, or the name of the error that refuses them."""
        try:
            self._target.load(self._folder, random)
        except MegatronExtError as error:
            self._check_message(str(error))
            return type(error).__name__
        return "loaded"

    def case(self, random: Random) -> str:
        """As ``load``, of files that ``random`` spoils."""
        spoilt = random.choice(sorted(self._target.mutators))
        path = self._folder / spoilt
        content = self._target.mutators[spoilt](random, self._valid[path])
        try:
            self._put(path, content, random)
            with limited():
                return self.load(random)
        finally:
            self._restore()

    def _put(self, path: Path, content: bytes, random: Random) -> None:
        """``content`` in place of a file, or now and then nothing, a folder or a link to nowhere."""
        path.unlink()
        place = random.randrange(100)
        if place == 0:
            path.mkdir()
        elif place == 1:
            path.symlink_to(self._folder / "nowhere")
        elif place > 2:
            path.write_bytes(content)

    def _restore(self) -> None:
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if path in self._valid or not any(path in valid.parents for valid in self._valid):
                    shutil.rmtree(path)
            else:
                path.unlink()
        for path, content in self._valid.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _check_message(self, message: str) -> None:
        assert message.isprintable() or message.replace("\n", "").isprintable(), f"not printable: {message!r:.500}"
        assert len(message) < LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:500]}"
        names = {str(self._folder), *(path.name for path in self._valid), *(path.stem for path in self._valid)}
        assert any(name in message for name in names), f"names no file: {message}"


@contextmanager
def limited() -> Iterator[None]:
    """Memory and processor time that end in MemoryError and ``Hang``."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, _hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {CPU_SECONDS} s of processor time")
