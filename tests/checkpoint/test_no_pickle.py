"""No pickle is read on the way from a checkpoint or a Hugging Face directory into a run: every loader that could is a trap here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import RunRanks
from tests.train.tiny_run import ROOT, train, write_run

TRAPS = """
import builtins, json, os, sys
from pathlib import Path

def trap(name):
    def loader(*arguments, **keywords):
        raise SystemExit(f"TRAP: {name}")
    return loader

def arm(folder):
    '''From here on no pickle can be read by any of the known ways, and every file of ``folder`` that is opened is noted.'''
    import _pickle, pickle, shelve, numpy, torch, yaml
    opened = []
    def watch(event, arguments):
        if event == "pickle.find_class":
            raise SystemExit(f"TRAP: {event}")
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder):
            opened.append(str(arguments[0]))
    sys.addaudithook(watch)
    for module, names in [
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")), (_pickle, ("load", "loads", "Unpickler")),
        (shelve, ("open",)), (torch, ("load",)), (torch.serialization, ("load", "_load", "_legacy_load")), (torch.jit, ("load",)),
        (torch.hub, ("load_state_dict_from_url",)), (yaml, ("load", "full_load", "unsafe_load", "UnsafeLoader", "FullLoader")),
    ]:
        for name in names:
            loader = trap(f"{module.__name__}.{name}")
            # Modules that are imported later may derive from what is a class.
            setattr(module, name, type(name, (), {"__init__": loader}) if isinstance(getattr(module, name), type) else loader)
    import numpy.lib.format
    numpy.lib.format.pickle = pickle
    return opened

# What a run needs is there before the traps are: only what it reads is of interest.
import deepspeed, torch._dynamo, yaml
import tests.train.tiny_run
import tools.convert_checkpoint
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``program`` after the traps were made, in a fresh interpreter."""
    command = [sys.executable, "-c", TRAPS + program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def saved(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps with a checkpoint in several files."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, train, write_run(folder, train__steps=2, planning__ahead=0, checkpoint__max_shard_gib=2e-5))
    yield folder


LOADING = """
folder, config = sys.argv[1:3]
opened = arm(folder)
from megatron_ext.config import load_config
from megatron_ext.train.run import pretrain
pretrain(load_config(config, ["train.steps=3"]))
from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights
from megatron_ext.model.gpt import GPT
saved = f"{folder}/run/checkpoints/step_00000003"
load_hf_weights(GPT(load_hf_config(saved)), saved)
code = tools.convert_checkpoint.main(["import", saved, f"{folder}/imported"])
print("DONE", code, json.dumps(sorted(set(opened))), flush=True)
os._exit(0)
"""


def test_resume_and_import_read_only_safetensors_and_json(saved: Path) -> None:
    done = run(LOADING, saved, saved / "config.yaml")
    assert "DONE 0 " in done.stdout, done.stdout + done.stderr
    assert f"resumed from     {saved}/run/checkpoints/step_00000002" in done.stdout
    opened = [Path(name) for name in json.loads(done.stdout.rpartition("DONE 0 ")[2])]
    checkpoint = [path for path in opened if "step_00000002" in path.parts]
    assert {"trainer_state.json", "index.json"} <= {path.name for path in checkpoint}, "the trap for files sees what is opened"
    assert {path.suffix for path in checkpoint if path.is_file()} == {".json", ".safetensors"}


ATTACKS = {
    "pickle.load": "import pickle; pickle.load(open(path, 'rb'))",
    "pickle.loads": "import pickle; pickle.loads(open(path, 'rb').read())",
    "a name bound before the traps": "early(open(path, 'rb'))",
    "torch.load": "import torch; torch.load(path, weights_only=False)",
    "torch.load of weights": "import torch; torch.load(path, weights_only=True)",
    "numpy": "import numpy; numpy.load(path, allow_pickle=True)",
    "yaml": "import yaml; yaml.unsafe_load('a: 1')",
    "joblib's way": "import pickle; pickle._Unpickler(open(path, 'rb'))",
}


ATTACKING = """
from pickle import load as early
import collections, pickle, torch
path = sys.argv[1]
Path(path).write_bytes(pickle.dumps(collections.OrderedDict(a=torch.zeros(2))))
for name, code in json.loads(sys.argv[2]).items():
    pid = os.fork()
    if pid == 0:
        arm("/nowhere")
        exec(code)
        os._exit(7)
    print(name, "=", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_the_traps_catch_every_way_to_read_a_pickle(tmp_path: Path) -> None:
    program = TRAPS.partition("# What a run needs")[0] + ATTACKING
    command = [sys.executable, "-c", program, str(tmp_path / "file"), json.dumps(ATTACKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout.splitlines() == [f"{name} = 1" for name in ATTACKS], done.stdout + done.stderr
    assert done.stderr.count("TRAP: ") == len(ATTACKS)
