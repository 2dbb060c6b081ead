"""Two hosts on one machine: network namespaces joined by a cable, each with its own sshd."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.31.1", "10.77.31.2")
COMMANDS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in COMMANDS if shutil.which(command, path=SYSTEM) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2 openssh-server openssh-client pdsh)"
    probe = subprocess.run(["ip", "netns", "add", _name(9)], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", _name(9)], capture_output=True)
    return f"no network namespace can be made: {probe.stderr.strip()}" if probe.returncode else None


def _name(number: int) -> str:
    return f"mext{os.getpid()}h{number}"


@dataclass(frozen=True)
class Hosts:
    """Two hosts that can reach each other by ssh."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables for commands on a host: the key that opens the other, and what the launcher hands on to it."""
        python = Path(sys.executable).parent
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
        return kept | {
            "PATH": f"{self.folder}:{python}:{SYSTEM}",
            "DS_ENV_FILE": str(self.folder / "deepspeed_env"),
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, number: int, *command: str) -> subprocess.Popen[str]:
        """Start a command on a host."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        inside = ["ip", "netns", "exec", _name(number), *command]
        return subprocess.Popen(inside, env=self.environment, start_new_session=True, cwd=Path(__file__).parents[2], **pipes)

    def die(self, number: int) -> None:
        """Kill everything that runs on a host, and pull its cable."""
        subprocess.run(["ip", "-n", _name(number), "link", "set", "eth0", "down"], check=True)
        _kill_all(number)


def _kill_all(number: int) -> None:
    pids = subprocess.run(["ip", "netns", "pids", _name(number)], capture_output=True, text=True).stdout.split()
    if pids:
        subprocess.run(["kill", "-9", *pids], capture_output=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make the hosts, and leave nothing of them behind."""
    try:
        _connect()
        _serve(folder)
        yield Hosts(folder)
    finally:
        for number in range(2):
            _kill_all(number)
            subprocess.run(["ip", "netns", "delete", _name(number)], capture_output=True)


def _connect() -> None:
    for number in range(2):
        _run("ip", "netns", "add", _name(number))
    _run("ip", "link", "add", "eth0", "netns", _name(0), "type", "veth", "peer", "name", "eth0", "netns", _name(1))
    for number, address in enumerate(ADDRESSES):
        _run("ip", "-n", _name(number), "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", _name(number), "link", "set", device, "up")


def _serve(folder: Path) -> None:
    for key in ("host_key", "key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    options = {"HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "authorized_keys", "PidFile": "none"}
    options |= {"StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes", "MaxStartups": "100"}
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()), "utf-8")
    Path("/run/sshd").mkdir(exist_ok=True)
    for number in range(2):
        _run("ip", "netns", "exec", _name(number), "/usr/sbin/sshd", "-f", str(folder / "sshd_config"))
    opened = f'exec /usr/bin/ssh -i {folder / "key"} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    (folder / "ssh").write_text(f"#!/bin/sh\n{opened}", "utf-8")
    (folder / "ssh").chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES), "utf-8")
    handed_on = ("GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1")
    (folder / "deepspeed_env").write_text("".join(f"{line}\n" for line in handed_on), "utf-8")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, env={"PATH": SYSTEM})
