"""Does every host see the same run directory?"""

import secrets
import socket
import time
from pathlib import Path

from megatron_ext.atomic_io import atomic_open
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.world import World

PATIENCE_SECONDS = 10.0
"""What a network file system may take until a new file is seen everywhere."""


def prove_writable(directory: Path) -> None:
    """Make ``directory``, which may be a link to one, and write into it; called on one rank before it meets others.

    Raises:
        ConfigError: says why nothing can be written there.
    """
    probe = directory / f".writable.{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir is {str(directory)!r}: {error.strerror}; accepted: a directory that can be written to") from error


def prove_shared(directory: Path, world: World) -> None:
    """Let rank 0 leave a word in ``directory``, which exists there, and every rank read it. All ranks call it and all raise.

    Raises:
        ConfigError: names the hosts that do not see it, and the key.
    """
    if world.size == 1:
        return
    word = world.on_main(secrets.token_hex(8) if world.is_main else None)
    path = directory / f".shared.{word}"
    if world.is_main:
        with atomic_open(path) as file:
            file.write(word)
    world.barrier()
    seen = _appears(path, word)
    blind = sorted({host for host in world.gather(None if seen else socket.gethostname()) if host is not None})
    if world.is_main:
        path.unlink()
    if blind:
        raise ConfigError(
            f"run_dir is {str(directory)!r}, which is another directory on {', '.join(blind)} than on rank 0's host; accepted: a directory "
            "on a file system that all hosts share"
        )


def _appears(path: Path, word: str) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if path.read_text("utf-8") == word:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
