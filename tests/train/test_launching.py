"""What is started on which host."""

import base64
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.train.launching import LaunchedRun, RemoteShell, launch_commands, parse_hosts
from megatron_ext.train.supervision import RankEnd
from tests.train.tiny_run import ROOT

SECRETS = ("HF_TOKEN", "HF_HUB_TOKEN", "NCCL_KEY", "PYTHON_DB_PASSWORD", "TORCH_client_secret")
GUARD = str(ROOT / "tools" / "guard_rank.py")


def test_hosts_come_from_a_hostfile_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\na slots=4\n\nb slots=2  # smaller\n", "utf-8")
    assert parse_hosts(str(tmp_path / "hosts")) == parse_hosts("a:4,b:2") == {"a": 4, "b": 2}


@pytest.mark.parametrize("content", ["a slots=0", "a slots=\u00b2", "-oProxyCommand=x slots=2", "a b slots=2", "a slots=1000000", "\xff"])
def test_a_hostfile_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content.encode("latin-1" if content == "\xff" else "utf-8"))
    with pytest.raises(ConfigError, match=f"^hosts: {path}: .*accepted: a hostfile of lines"):
        parse_hosts(str(path))


def test_each_host_is_told_its_number_and_all_the_same_world() -> None:
    commands = launch_commands({"a": 2, "b": 1}, 29500, ["guard.py", "train.py", "--config", "c.yaml"])
    worlds = {word.partition("=")[2] for command in commands.values() for word in command if word.startswith("--world_info")}
    assert [json.loads(base64.urlsafe_b64decode(world)) for world in worlds] == [{"a": [0, 1], "b": [0]}]
    for number, command in enumerate(commands.values()):
        assert {f"--node_rank={number}", "--master_addr=a", "--master_port=29500", "--no_local_rank"} < set(command)
        assert command[-4:] == ["guard.py", "train.py", "--config", "c.yaml"]


def test_a_command_comes_through_a_shell_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``sh -c`` in the place of ssh, which hands its last argument to a shell too."""
    monkeypatch.setenv("NCCL_DEBUG", "IN FO")
    for name in ("SECRET", *SECRETS):
        monkeypatch.setenv(name, "kept here")
    monkeypatch.chdir(tmp_path)
    program = "import os, sys, json; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['NCCL_DEBUG'], 'SECRET' in os.environ]))"
    *shell, host, text = RemoteShell("ssh -x").on("far", [sys.executable, "-c", program, "model={a: 'b c', $d: 1}"])
    assert shell == ["ssh", "-x"] and host == "far"
    done = subprocess.run(["env", "-i", "sh", "-c", text], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["model={a: 'b c', $d: 1}"], str(tmp_path), "IN FO", False]
    assert "kept here" not in text
    assert RemoteShell().on("localhost", ["x", "y"]) == ["x", "y"]


def test_a_host_that_does_not_answer_in_time_is_unreachable(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\ncase "$1" in good) exit 0;; bad) exit 255;; slow) sleep 20;; esac\n', "utf-8")
    shell.chmod(0o755)
    assert RemoteShell(shlex.quote(str(shell))).unreachable(["good", "bad", "slow", "localhost"], seconds=2) == ["bad", "slow"]


def test_guards_say_how_ranks_ended_and_kill_them_when_the_supervisor_lets_go(tmp_path: Path) -> None:
    """Two hosts, each of one guard without a launcher: one rank kills itself, the other would sleep on."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, time\nprint('here', flush=True)\nif os.environ['RANK'] == '0':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n",
        "utf-8",
    )
    commands = {host: ["env", f"RANK={number}", sys.executable, GUARD, str(script)] for number, host in enumerate("ab")}
    printed: list[str] = []
    run = LaunchedRun(commands, printed.append)
    begin = time.monotonic()
    assert run.wait(1.0, lambda: False) == 128 + 9
    assert time.monotonic() - begin < 30
    assert run.ends == [RankEnd(0, "a", -9)] and printed == ["here", "here"]
