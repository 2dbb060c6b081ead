"""Ranks on many hosts: the deepspeed launcher on each of them."""

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import shown
from megatron_ext.train.started_run import StartedRun
from megatron_ext.train.supervision import rank_end

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
LOCAL = ("localhost", "127.0.0.1")
HOST = re.compile(r"[\w\[][\w.:@%\]-]*", re.ASCII)
"""No name that ssh would take for an option."""
SLOTS = re.compile("[1-9][0-9]{0,3}")
HANDED_ON = ("PYTHON", "OMP_", "DS_", "NCCL_", "GLOO_", "UCX_", "TORCH_", "HF_", "CUDA_HOME", "LD_LIBRARY_PATH", "PATH")
"""Beginnings of the names of variables that ranks on other hosts get too."""
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSW", "CREDENTIAL")
"""Parts of the names of variables that are not handed on: the command line that they would stand in is for every process to read."""
KILL_SECONDS = 15.0
"""How long launchers get to end after their ranks were killed; a connection to a host that is gone takes so long to notice it."""


@dataclass(frozen=True)
class RemoteShell:
    """How a command is run on a host: directly on this one, through ``command host`` on others.

    Others get variables of this environment (``HANDED_ON``), but none whose name says that it is secret (``SECRETS``). What needs a secret
    there reads it from the file that its library has for it, on that host or in a home that hosts share: ``~/.cache/huggingface/token`` (or
    below ``HF_HOME``), ``~/.netrc``.
    """

    command: str = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """``command`` as it is started here to run on ``host``, in this directory and with this environment's variables."""
        if is_local(host):
            return list(command)
        handed_on = [f"{name}={value}" for name, value in os.environ.items() if _is_handed_on(name)]
        inside = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *handed_on, *command])}"
        return [*shlex.split(self.command), host, inside]

    def unreachable(self, hosts: Sequence[str], seconds: float = 20.0) -> list[str]:
        """Those of ``hosts`` on which nothing can be run within ``seconds``. All are asked at once."""
        asked = {
            host: subprocess.Popen(
                [*shlex.split(self.command), host, "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for host in hosts
            if not is_local(host)
        }
        end = time.monotonic() + seconds
        return [host for host, process in asked.items() if not _answers(process, end - time.monotonic())]


def is_local(host: str) -> bool:
    """True if a host is this one."""
    return host in (*LOCAL, socket.gethostname())


def _is_handed_on(name: str) -> bool:
    return name.startswith(HANDED_ON) and not any(part in name.upper() for part in SECRETS)


def _answers(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        return process.wait(max(0.1, seconds)) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def parse_hosts(text: str) -> dict[str, int]:
    """Ranks of each host from ``a:4,b:4`` or from the lines ``a slots=4`` of a hostfile, as the deepspeed launcher reads it.

    Raises:
        ConfigError: what is neither, with the entry; a file that cannot be read.
    """
    if os.path.isfile(text):
        where = f"hosts: {text}"
        pairs = [tuple(" ".join(words).split(" slots=", 1)) for words in _hostfile(text) if words]
    else:
        where = "hosts"
        pairs = [tuple(entry.rsplit(":", 1)) for entry in text.split(",")]
    hosts: dict[str, int] = {}
    for pair in pairs:
        if len(pair) != 2 or not HOST.fullmatch(pair[0]) or not SLOTS.fullmatch(pair[1]) or pair[0] in hosts:
            accepted = "a hostfile of lines 'name slots=N', or name:N,..., each host once, N from 1 to 9999"
            raise ConfigError(f"{where}: {shown(' '.join(pair))}; accepted: {accepted}")
        hosts[pair[0]] = int(pair[1])
    local = [host for host in hosts if host in LOCAL]
    if not hosts or (local and len(hosts) > 1):
        raise ConfigError(
            f"hosts: {shown(text)}; accepted: one host or more; beside others, {local or 'each'} by a name that the others resolve"
        )
    return hosts


def _hostfile(path: str) -> list[list[str]]:
    """The words of each line."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.split("#")[0].split() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hosts: {path}: {error}; accepted: a hostfile of lines 'name slots=N'") from error


def launch_commands(ranks: Mapping[str, int], port: int, script: Sequence[str]) -> dict[str, list[str]]:
    """What runs on each host: the deepspeed launcher's own part for one host, which starts ``script`` for every rank of it.

    ``deepspeed --hostfile`` would start the same on all hosts, through pdsh, of which only one exit code comes back.
    """
    info = base64.urlsafe_b64encode(json.dumps({host: list(range(count)) for host, count in ranks.items()}).encode()).decode()
    first = next(iter(ranks))
    master = "127.0.0.1" if is_local(first) and len(ranks) == 1 else first
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--master_addr={master}"]
    options = [f"--master_port={port}", "--no_local_rank", "--log_level=warning"]
    return {host: [*launcher, f"--node_rank={number}", *options, *script] for number, host in enumerate(ranks)}


def free_port() -> int:
    """A port that nothing on this host listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LaunchedRun(StartedRun):
    """A run that launchers started.

    Args:
        commands: for each host, what starts its ranks, as it is run on this host.
        say: gets every line that is printed.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], say: Callable[[str], None]) -> None:
        super().__init__(say)
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # Sessions of their own: Ctrl-C is for the supervisor, which stops the run in good order.
        self._processes = {
            host: subprocess.Popen(command, env=environment, start_new_session=True, **pipes) for host, command in commands.items()
        }
        for host, process in self._processes.items():
            assert process.stdout is not None, "it was asked for"
            self._read(process.stdout, host)

    def _poll(self) -> list[int | None]:
        return [process.poll() for process in self._processes.values()]

    def _note(self, line: str, host: str) -> None:
        end = rank_end(line, host)
        if end is None:
            super()._note(line, host)
        else:
            self._note_end(end)

    def _end(self) -> None:
        """Ranks on all hosts are killed as their standard input ends."""
        for process in self._processes.values():
            assert process.stdin is not None, "it was asked for"
            process.stdin.close()
        end = time.monotonic() + KILL_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
