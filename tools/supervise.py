#!/usr/bin/env python3
"""Start a run and keep it running: when it fails it is started again, on the hosts that remain, from the last whole checkpoint.

    python tools/supervise.py --hosts a:8,b:8 --config examples/configs/quickstart_pretrain.yaml parallel.tp=4
    python tools/supervise.py --local 2 --config examples/configs/quickstart_pretrain.yaml

Each host gets the deepspeed launcher's own part for one host, through ssh or directly. Run directory and data lie where all hosts see
them. A restart keeps tp and pp where they still fit and makes dp what is left, else takes the next best grid, and says which and why; the
tokens of a step stay, so the training is the same. A damaged newest checkpoint is passed over. SIGTERM or Ctrl-C ends the run in good
order: it saves and ends with 0; a second one kills it. What was done and why is printed and appended to RUN_DIR/supervisor.jsonl.

After a start that brought no new checkpoint there is a pause of 5 s (--pause) before the next, twice as long each time up to 300 s. Hosts
that cannot be reached are waited for in such pauses if nothing fits on the others, for 1800 s at most (--wait).

DeepSpeed has no elastic agent any more (0.19 refuses its configuration). torchrun's agent does not serve: it starts every round with the
same arguments, so the grid cannot follow the hosts, needs a rendezvous host that does not die, and knows nothing of checkpoints.

Exit code: 0 after a good end; 2 if the configuration or the data cannot be used; else that of the last failure.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.train.launching import RemoteShell, parse_hosts
from megatron_ext.train.supervision import Limits
from megatron_ext.train.supervisor import Supervised, Supervisor

ROOT = Path(__file__).resolve().parents[1]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    usual, remote = Limits(), RemoteShell()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", metavar="FILE|a:4,b:4", help="hostfile of lines 'name slots=4', or hosts with the ranks of each")
    where.add_argument("--local", type=int, metavar="N", help="N ranks on this host")
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as optimizer.lr=3e-4")
    parser.add_argument("--max-restarts", type=int, default=usual.restarts, metavar="K", help="within --window (%(default)s)")
    parser.add_argument("--window", type=int, default=usual.window, metavar="STEPS", help="steps of progress (%(default)s)")
    parser.add_argument("--max-stuck", type=int, default=usual.stuck, metavar="K", help="restarts without a new checkpoint (%(default)s)")
    parser.add_argument("--strikes", type=int, default=usual.strikes, metavar="K", help="killed ranks that lose a host (%(default)s)")
    parser.add_argument(
        "--pause", type=float, default=usual.pause, metavar="S", help="seconds before a restart if there is no new checkpoint (%(default)s)"
    )
    parser.add_argument("--wait", type=float, default=usual.hosts, metavar="S", help="seconds to wait for hosts at most (%(default)s)")
    parser.add_argument("--grace", type=float, default=10.0, metavar="S", help="seconds for the others to end after a failure, below 30")
    parser.add_argument("--remote-shell", default=remote.command, metavar="COMMAND", help="gets host and command (%(default)s)")
    parser.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="first port on the first host (%(default)s)")
    parser.add_argument("--fork", action="store_true", help="with --local, on CPUs: ranks are forks of one process, for quick restarts")
    parser.add_argument("--script", default=str(ROOT / "examples" / "pretrain.py"), help="what each rank runs (%(default)s)")
    return parser.parse_args(arguments)


def supervised(options: argparse.Namespace) -> Supervised:
    """What the command line asks for. Raises ConfigError."""
    limits = Limits(options.max_restarts, options.window, options.max_stuck, options.strikes, options.pause, options.wait)
    if min(limits.restarts, limits.stuck) < 0 or min(limits.window, limits.strikes) < 1:
        raise ConfigError(f"{limits}; accepted: restarts and stuck of at least 0, window and strikes of at least 1")
    if not (0 <= limits.pause < math.inf and 0 <= limits.hosts < math.inf):
        raise ConfigError(f"--pause is {limits.pause}, --wait is {limits.hosts}; accepted: seconds from 0 on")
    if not 0 <= options.grace < 30:
        raise ConfigError(f"--grace is {options.grace}; accepted: 0 to below 30 seconds, after which the launcher itself kills ranks")
    return Supervised(
        config=options.config,
        overrides=tuple(options.overrides),
        hosts=parse_hosts(options.hosts if options.hosts is not None else f"localhost:{options.local}"),
        script=options.script,
        guard=str(ROOT / "tools" / "guard_rank.py"),
        fork=options.fork,
        remote=RemoteShell(options.remote_shell),
        limits=limits,
        grace=options.grace,
        port=options.master_port,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status."""
    try:
        return Supervisor(supervised(parse(arguments))).run()
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
