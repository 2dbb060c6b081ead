"""The Slurm script hands each node's launcher what it needs; Slurm's commands are stand-ins that print."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.sbatch"
FAKES = {
    # Two writes, as a long list of nodes takes: a reader that leaves after the first line breaks the pipe.
    "scontrol": "echo node7; sleep 0.1; echo node9\n",
    "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done\n',
    "deepspeed": 'cat "$2"; echo "$@"\n',
}


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}", "utf-8")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(folder)}
    environment = os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def test_every_node_starts_its_launcher_with_its_number(tmp_path: Path) -> None:
    done = submit(tmp_path, "a config.yaml", "data.replay={share: 0.2}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == lines[3:5] == ["node7 slots=4", "node9 slots=4"]
    for number, line in enumerate((lines[2], lines[5])):
        assert f"--no_ssh --node_rank {number} --master_addr node7 --master_port 20031 " in line
        assert line.endswith("examples/pretrain.py --config a config.yaml data.replay={share: 0.2}")
    assert not list(tmp_path.glob("hostfile.*"))


def test_a_missing_configuration_is_said(tmp_path: Path) -> None:
    done = submit(tmp_path)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr
