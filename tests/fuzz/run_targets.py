"""What runs and supervisors leave in a run directory for themselves, and the list of hosts."""

import json
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from random import Random

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.report.digests import first_difference, read_digests
from megatron_ext.train.file_lock import FileLock, Owner
from megatron_ext.train.launching import parse_hosts
from megatron_ext.train.ledger import FOLDER, Ledger
from megatron_ext.train.ledger_check import check_ledger
from megatron_ext.train.sources import build_mixture
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_json_lines
from tests.fuzz.target import Target
from tests.train.tiny_run import write_run

LEDGERS = ("whole", "later")
STEPS = 6


def _make_ledger(folder: Path) -> None:
    """Of a run from its first step on, that goes back once, and of one whose ledger was switched on after step 2."""
    config = load_config(write_run(folder, logging__ledger=True), [])
    for name in LEDGERS:
        mixture, run = build_mixture(config), folder / name
        run.mkdir()
        ledger = Ledger(run, [corpus.name for corpus in mixture.corpora], active=True, trained=True)
        for step in range(STEPS):
            if step == (2 if name == "later" else 0):
                ledger.begin(step, 0, mixture.state_dict())
            if step == 3:
                ledger.pass_over(step, 0, step + 1, mixture.take(64))
            pieces = mixture.take(64)
            if step >= 2 or name == "whole":
                ledger.write(step + 1, pieces, skipped=step == 4)
        ledger.flush()


def _load_ledger(folder: Path, random: Random) -> None:
    config = load_config(folder / "config.yaml", ["data.tokens_per_step=64"])
    for name in LEDGERS:
        report = check_ledger(folder / name, config)
        assert all(problem.isprintable() for problem in report.problems)
        ledger = Ledger(folder / name, ["prose", "code"], active=True, trained=True)
        ledger.begin(random.randrange(STEPS + 1), random.randrange(2), {})
        ledger.flush()


LEDGER_FILES = [f"{name}/{FOLDER}/00000000.jsonl" for name in LEDGERS]
LEDGER_TARGET = Target(_make_ledger, dict.fromkeys(LEDGER_FILES, mutate_json_lines), _load_ledger)


def _make_digests(folder: Path) -> None:
    tensors = {"model.embed_tokens.weight": ["a1", 2.0], "lm_head.weight": ["b2", 3.5]}
    begin = {"kind": "begin", "time": 1.0, "step": 0, "parameters": tensors}
    step = {"kind": "digests", "documents": "dd", "loss": 3.0, "lr": 0.1, "gradients": tensors, "parameters": tensors}
    for name in ("one", "other"):
        (folder / name).mkdir()
        records = [begin, {**step, "step": 1}, {**begin, "step": 1}, {**step, "step": 2}]
        (folder / name / "digests.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def _load_digests(folder: Path, random: Random) -> None:
    found = first_difference(*(read_digests(folder / name) for name in ("one", "other")))
    assert found is None or str(found)


DIGESTS_TARGET = Target(_make_digests, {"one/digests.jsonl": mutate_json_lines}, _load_digests)


def _make_lock(folder: Path) -> None:
    """Of a process that is gone, and of one on another machine, which gives no sign of life."""
    for name, owner in {"here": replace(Owner.me(), started="1"), "far": replace(Owner.me(), machine="another kernel")}.items():
        (folder / name).mkdir()
        (folder / name / "lock.json").write_text(json.dumps(asdict(owner)), "utf-8")


def _load_lock(folder: Path, random: Random) -> None:
    said = StringIO()
    for name in ("here", "far"):
        # A copy: the lock is gone at the end.
        run = shutil.copytree(folder / name, folder / "copy" / name, symlinks=True)
        lock = FileLock(run / "lock.json", lambda owner, run=run: f"{run} is used by {owner}", silent_seconds=0.001)
        with redirect_stdout(said), lock:
            assert lock.holds()
        assert list(run.iterdir()) == []
    shutil.rmtree(folder / "copy")
    assert said.getvalue().replace("\n", "").isprintable()


LOCK_TARGET = Target(_make_lock, {"here/lock.json": mutate_json, "far/lock.json": mutate_json}, _load_lock)


def _make_hosts(folder: Path) -> None:
    (folder / "hostfile").write_text("# two hosts\nnode-a slots=4\n\n10.0.0.2 slots=2  # smaller\n", "utf-8")


def _load_hosts(folder: Path, random: Random) -> None:
    try:
        hosts = parse_hosts(str(folder / "hostfile"))
    except ConfigError as error:
        assert "accepted" in str(error)
        raise
    assert hosts and all(host.isascii() and host.isprintable() and not host.startswith("-") for host in hosts)
    assert all(0 < ranks < 10000 for ranks in hosts.values())


HOSTS_TARGET = Target(_make_hosts, {"hostfile": mutate_bytes}, _load_hosts)
