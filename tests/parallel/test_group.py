"""Values of the collectives, and the bytes that they say they send against those that go over a network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.group import MAX
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import data_grid


def collectives(world: World) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Results of every collective of this rank's tensor [6, 2] of its rank, and the bytes that were counted."""
    group = data_grid(world).dp
    mine = torch.full((6, 2), float(world.rank))
    results = {"all_reduce": group.all_reduce(mine.clone()), "maximum": group.all_reduce(mine.clone(), MAX)}
    results["all_gather"] = group.all_gather(mine)
    results["reduce_scatter"] = group.reduce_scatter(mine + torch.arange(6)[:, None])
    for name, start in (("reduce", group.start_reduce), ("broadcast", group.start_broadcast)):
        results[name] = mine.clone()
        work = start(results[name], 1)
        assert work is not None
        work.wait()
    if world.rank == 0:
        group.send(mine + 5, 1)
    results["send"] = group.receive(mine.clone(), 0) if world.rank == 1 else mine
    assert len(group.all_gather(torch.zeros(0, 3))) == 0, "nothing is nothing, and sends nothing"
    return results, {name: sent for (_, name), sent in group.traffic.sent.items()}


def test_values_and_counted_bytes(run_ranks: RunRanks) -> None:
    size, nbytes = 3, 6 * 2 * 4
    for rank, (results, sent) in enumerate(run_ranks(size, collectives)):
        assert torch.equal(results["all_reduce"], torch.full((6, 2), 3.0))
        assert torch.equal(results["maximum"], torch.full((6, 2), 2.0))
        assert torch.equal(results["all_gather"], torch.arange(3.0).repeat_interleave(6)[:, None].expand(18, 2))
        assert torch.equal(results["reduce_scatter"], 3 + 3 * torch.arange(2.0 * rank, 2 * rank + 2)[:, None].expand(2, 2))
        assert torch.equal(results["broadcast"], torch.ones(6, 2))
        assert rank != 1 or torch.equal(results["reduce"], torch.full((6, 2), 3.0))
        assert rank != 1 or torch.equal(results["send"], torch.full((6, 2), 5.0))
        ring = (size - 1) * nbytes // size
        expected = {"all_reduce": 2 * 2 * ring, "all_gather": 2 * nbytes, "reduce_scatter": ring, "reduce": ring, "broadcast": ring}
        assert sent == expected | ({"send": nbytes} if rank == 0 else {})


def test_a_group_of_one_sends_nothing() -> None:
    group = data_grid().dp
    x = torch.ones(3)
    assert group.all_reduce(x) is x and group.all_gather(x) is x and group.reduce_scatter(x) is x
    assert group.start_reduce(x, 0) is None and group.start_broadcast(x, 0) is None
    assert not group.traffic.sent


MEASURE = """
import sys
from tests.distributed import run_ranks
from tests.parallel.test_group import measured
for row in run_ranks(2, measured):
    print(*row)
"""
ELEMENTS = 4 * 2**20


def measured(world: World) -> list[str]:
    """Name, bytes counted over both ranks, and bytes that passed the loopback device, of one large collective of each kind."""
    grid = Grid(world, GridShape(1, world.size, 1))
    group, x, rows = grid.dp, torch.ones(ELEMENTS), []
    works = {
        "all_reduce": lambda: group.all_reduce(x),
        "all_gather": lambda: group.all_gather(x),
        "reduce_scatter": lambda: group.reduce_scatter(x),
        "reduce": lambda: group.start_reduce(x, 0).wait(),
        "broadcast": lambda: group.start_broadcast(x, 0).wait(),
    }
    for name, work in works.items():
        work()
        world.barrier()
        before, counted = _loopback(), grid.traffic.sent["dp", name]
        world.barrier()
        work()
        world.barrier()
        rows.append(f"{name} {int(world.sum(torch.tensor([grid.traffic.sent['dp', name] - counted])))} {_loopback() - before}")
        world.barrier()
    return rows


def _loopback() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text("utf-8").splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def test_counted_bytes_are_those_that_a_network_carries() -> None:
    """Two ranks alone in a network namespace: what passes its loopback device is what they send."""
    inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable, MEASURE]
    probe = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespace can be made here: {probe.stderr.strip()}")
    done = subprocess.run(inside, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    # Libraries may have said something before.
    words = done.stdout.splitlines()[-1].split()
    found = {words[n]: (int(words[n + 1]), int(words[n + 2])) for n in range(0, len(words), 3)}
    assert set(found) == {"all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast"}
    for name, (counted, carried) in found.items():
        # What the docstring of Group says of gloo.
        least, most = {"reduce_scatter": (1.95, 2.1), "reduce": (1.95, 2.3)}.get(name, (0.99, 1.05))
        assert least <= carried / counted <= most, f"{name}: {found}"
