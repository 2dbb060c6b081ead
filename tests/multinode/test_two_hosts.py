"""The run of two hosts, as a user starts it, equals that of one host; and a host that dies ends it with its name."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import RunRanks
from tests.multinode.hosts import ADDRESSES, Hosts, two_hosts, why_not
from tests.train.tiny_run import losses, train, write_run

OBSTACLE = why_not()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"no hosts can be made here: {OBSTACLE}")
MASTER = ("--master_addr", ADDRESSES[0], "--master_port", "29611")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def test_the_launcher_starts_both_hosts_and_losses_are_those_of_one(hosts: Hosts, run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path / "two", train__steps=4)
    start = ("deepspeed", "--hostfile", str(hosts.folder / "hostfile"), *MASTER, "examples/pretrain.py", "--config", str(config))
    output = finish(hosts.start(0, *start))
    assert "2: pp 1 x dp 2 x tp 1" in output
    run_ranks(2, train, write_run(tmp_path / "one", train__steps=4))
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(tmp_path / "one" / "run"), rel=1e-6)


def alone(hosts: Hosts, number: int, config: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start one host's part without ssh, as a batch system does."""
    launch = ("deepspeed", "--hostfile", str(hosts.folder / "hostfile"), "--no_ssh", "--node_rank", str(number), *MASTER)
    return hosts.start(number, *launch, "examples/pretrain.py", "--config", str(config), *overrides)


def test_a_host_that_dies_ends_the_run_with_its_name(hosts: Hosts, tmp_path: Path) -> None:
    """Started without ssh; also after the death the last checkpoint is there to go on from."""
    config = write_run(tmp_path, train__steps=100000, checkpoint__every=2, train__heartbeat_timeout=6.0)
    survivor, doomed = (alone(hosts, number, config) for number in range(2))
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():
        assert time.monotonic() < end and survivor.poll() is None, "the run does not begin"
        time.sleep(0.2)
    hosts.die(1)
    begin = time.monotonic()
    output, _ = survivor.communicate(timeout=60)
    doomed.communicate(timeout=10)
    assert survivor.returncode != 0
    assert time.monotonic() - begin < 30
    assert "rank 1 on host" in output and "has not been heard for" in output
