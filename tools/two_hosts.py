"""Two hosts on one machine for benchmarks: network namespaces joined by a cable of a given rate. Needs root and iproute2."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.78.31.1", "10.78.31.2")


@contextmanager
def two_hosts(megabits: float) -> Iterator[tuple[str, str]]:
    """Make the hosts and leave nothing of them behind; yields their names.

    Args:
        megabits: rate of the cable each way, in Mbit/s, held by a token bucket (``tc qdisc ... tbf``) on both ends.
    """
    names = (f"bench{os.getpid()}a", f"bench{os.getpid()}b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            bucket = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "400ms"]
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *bucket)
        yield names
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            if pids:
                subprocess.run(["kill", "-9", *pids], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()} (root and iproute2 are needed)")
