"""A host dies in the middle of a supervised run: the other goes on, on another grid, with the same losses."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.train.supervisor_log import last_step
from tests.distributed import RunRanks
from tests.multinode.hosts import ADDRESSES, Hosts, two_hosts, why_not
from tests.train.tiny_run import losses, train, write_run

OBSTACLE = why_not()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"no hosts can be made here: {OBSTACLE}")
RUN = {
    "train__steps": 30,
    "train__dtype": "float64",
    "train__heartbeat_timeout": 10.0,
    "checkpoint__every": 5,
    "schedule__kind": "constant",
    "parallel__tp": 2,
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("supervised")) as made:
        yield made


@pytest.mark.slow  # starts through the launcher, again and again
def test_a_host_that_dies_changes_the_grid_and_no_loss(hosts: Hosts, run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(2, train, write_run(tmp_path / "reference", **RUN))
    config, run_dir = write_run(tmp_path / "hosts", **RUN), tmp_path / "hosts" / "run"
    where = ",".join(f"{address}:1" for address in ADDRESSES)
    process = hosts.start(0, sys.executable, "tools/supervise.py", "--hosts", where, "--master-port", "29651", "--config", str(config))
    end = time.monotonic() + 400
    while last_step(run_dir / "metrics.jsonl") < 8:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.02)
    hosts.die(1)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and "finished: step 30" in text, text
    events = [json.loads(line) for line in (run_dir / "supervisor.jsonl").read_text("utf-8").splitlines()]
    lost, restart = (next(event for event in events if event["event"] == name) for name in ("host_lost", "restart"))
    assert lost["host"] == restart["host"] == ADDRESSES[1] and restart["reason"] == f"{ADDRESSES[1]} cannot be reached"
    assert restart["grid_before"] == {"pp": 1, "dp": 1, "tp": 2} and restart["grid"] == {"pp": 1, "dp": 1, "tp": 1}
    assert restart["hosts"] == {ADDRESSES[0]: 1} and restart["step"] >= 5
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "reference" / "run"), rel=1e-10, abs=0)
