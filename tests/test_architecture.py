"""Rules that hold over the whole source: who imports whom, what is never called, what a room needs to be imported.

Every rule is a function from the source of one module to findings, and is shown here to find something in a source that breaks it.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "planning": set(),
    "kernels": set(),
    "precision": {"kernels"},
    "parallel": {"precision", "kernels"},
    "optim": {"parallel", "kernels"},
    "data": {"planning"},
    "model": {"parallel", "precision", "kernels"},
    "checkpoint": {"optim", "model", "parallel", "data"},
    "report": {"optim", "model", "parallel", "data"},
    "config": set(),
    "train": {"planning", "kernels", "precision", "parallel", "optim", "data", "model", "checkpoint", "report", "config"},
}
"""Room -> rooms that it may import. Every room may also import itself, the modules beside the rooms, and the options of every room."""
FOR_ALL = {"errors", "atomic_io", "json_text", "option_rules"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen", "eval", "exec"}
"""Calls that run what they read."""
HOME_OF_CUDA = ("megatron_ext/parallel/device.py", "megatron_ext/kernels/")
HEAVY = {
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "pydantic",
    "yaml",
    "rich",
    "pyarrow",
    "numba",
    "safetensors",
}

Rule = Callable[[ast.Module, str], Iterator[str]]


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a module; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def dotted_name(node: ast.AST) -> str:
    """``a.b.c`` for an attribute chain on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted_name(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""


def imports_against_the_order(tree: ast.Module, path: str) -> Iterator[str]:
    """Imports from one room to another that the order of the rooms does not allow."""
    parts = Path(path).with_suffix("").parts
    room = parts[1] if parts[0] == "megatron_ext" and len(parts) > 2 else None
    if room is not None and room not in ROOMS:
        yield f"{room} is no room"
        return
    for line, name in imported_modules(tree):
        if name.startswith("."):
            yield f"line {line}: relative import {name}"
        package, _, inside = name.partition(".")
        target, _, rest = inside.partition(".")
        if package != "megatron_ext" or parts[0] != "megatron_ext" or target in FOR_ALL | {room, "__version__"}:
            continue
        if room is None or (target not in ROOMS[room] and rest.split(".")[0] != "options"):
            yield f"line {line}: {room or path} imports {name}"


def reads_code_as_data(tree: ast.Module, path: str) -> Iterator[str]:
    """Pickle, eval and their kin, and shells."""
    for line, name in imported_modules(tree):
        if name.split(".")[0] in PICKLERS or name in UNSAFE_CALLS:
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if dotted_name(node.func) in UNSAFE_CALLS:
            yield f"line {node.lineno}: calls {dotted_name(node.func)}"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not is_false(keyword.value):
                yield f"line {node.lineno}: {keyword.arg} is not False"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def names_cuda(tree: ast.Module, path: str) -> Iterator[str]:
    """Uses of ``torch.cuda`` outside the module that knows devices and the kernels."""
    if path.startswith(HOME_OF_CUDA):
        return
    for line, name in imported_modules(tree):
        if f"{name}.".startswith("torch.cuda."):
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if dotted_name(node) == "torch.cuda":
            yield f"line {node.lineno}: uses torch.cuda"


def has_global_state(tree: ast.Module, path: str) -> Iterator[str]:
    """``global`` statements, and module-level names that are bound to an empty container, which only makes sense to be filled later."""
    yield from (f"line {node.lineno}: global statement" for node in ast.walk(tree) if isinstance(node, ast.Global))
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        is_empty_display = (isinstance(value, ast.List | ast.Set) and not value.elts) or (isinstance(value, ast.Dict) and not value.keys)
        is_container_call = isinstance(value, ast.Call) and dotted_name(value.func) in ("list", "dict", "set", "defaultdict", "deque")
        if is_empty_display or is_container_call:
            yield f"line {node.lineno}: module-level mutable container"


def is_too_long(tree: ast.Module, path: str) -> Iterator[str]:
    """Functions of more than 100 lines, files of more than 600."""
    last = max((node.end_lineno or 0 for node in tree.body), default=0)
    if last > 600:
        yield f"{last} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 100:
            yield f"line {node.lineno}: {node.name} has more than 100 lines"


BROKEN: list[tuple[Rule, str, str, int]] = [
    (imports_against_the_order, "megatron_ext/planning/a.py", "from megatron_ext.data.batch import PackedBatch", 1),
    (imports_against_the_order, "megatron_ext/model/a.py", "def f():\n    import megatron_ext.train.run", 1),
    (imports_against_the_order, "megatron_ext/model/a.py", "from megatron_ext import config", 1),
    (imports_against_the_order, "megatron_ext/optim/a.py", "from . import adamw", 1),
    (imports_against_the_order, "megatron_ext/config/a.py", "from megatron_ext.data.corpus import Corpus", 1),
    (imports_against_the_order, "megatron_ext/errors.py", "from megatron_ext.model.gpt import GPT", 1),
    (imports_against_the_order, "megatron_ext/utils/a.py", "", 1),
    (imports_against_the_order, "megatron_ext/config/a.py", "from megatron_ext.data.options import DataOptions", 0),
    (imports_against_the_order, "megatron_ext/train/a.py", "from megatron_ext.config import load_config", 0),
    (imports_against_the_order, "megatron_ext/kernels/a.py", "from megatron_ext.errors import ConfigError", 0),
    (imports_against_the_order, "tools/a.py", "from megatron_ext.config import load_config", 0),
    (reads_code_as_data, "tools/a.py", "import pickle", 1),
    (reads_code_as_data, "tools/a.py", "from pickle import loads", 1),
    (reads_code_as_data, "tools/a.py", "import torch\ntorch.load('a', weights_only=True)", 1),
    (reads_code_as_data, "tools/a.py", "from torch import load", 1),
    (reads_code_as_data, "tools/a.py", "yaml.load(text, Loader=yaml.Loader)", 1),
    (reads_code_as_data, "tools/a.py", "eval('1'); exec('2')", 2),
    (reads_code_as_data, "tools/a.py", "subprocess.run('ls', shell=True)", 1),
    (reads_code_as_data, "tools/a.py", "subprocess.run('ls', shell=flag)", 1),
    (reads_code_as_data, "tools/a.py", "np.load('a', allow_pickle=True)", 1),
    (reads_code_as_data, "tools/a.py", "model.eval(); yaml.safe_load(text); f(shell=False)", 0),
    (names_cuda, "megatron_ext/train/a.py", "if torch.cuda.is_available(): pass", 1),
    (names_cuda, "megatron_ext/train/a.py", "from torch import cuda", 1),
    (names_cuda, "megatron_ext/train/a.py", "import torch.cuda.nvtx", 1),
    (names_cuda, "megatron_ext/parallel/device.py", "torch.cuda.is_available()", 0),
    (names_cuda, "megatron_ext/kernels/a.py", "torch.cuda.is_available()", 0),
    (has_global_state, "megatron_ext/a.py", "def f():\n    global x\n    x = 1", 1),
    (has_global_state, "megatron_ext/a.py", "CACHE = {}\nSEEN: list[int] = []\nQUEUE = deque()", 3),
    (has_global_state, "megatron_ext/a.py", "NAMES = {'a': 1}\ndef f():\n    found = []\n    return found", 0),
    (is_too_long, "megatron_ext/a.py", "def f():\n" + "    x = 1\n" * 100, 1),
    (is_too_long, "megatron_ext/a.py", "def f():\n" + "    x = 1\n" * 99, 0),
    (is_too_long, "megatron_ext/a.py", "x = 1\n" * 601, 1),
]


@pytest.mark.parametrize(
    ("rule", "path", "source", "findings"), BROKEN, ids=[f"{rule.__name__}-{n}" for n, (rule, *_) in enumerate(BROKEN)]
)
def test_rule_finds_what_breaks_it_and_nothing_else(rule: Rule, path: str, source: str, findings: int) -> None:
    assert len(list(rule(ast.parse(source), path))) == findings


def sources() -> list[Path]:
    return sorted(path for folder in ("megatron_ext", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))


def test_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[1] for path in sources()} >= set(ROOMS) | {"errors.py"}


@pytest.mark.parametrize("rule", [imports_against_the_order, reads_code_as_data, names_cuda, has_global_state, is_too_long])
def test_whole_source_keeps(rule: Rule) -> None:
    paths = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in sources()}
    assert [f"{path}: {finding}" for path, tree in paths.items() for finding in rule(tree, path)] == []


def loaded_by(statement: str, after: str = "") -> set[str]:
    """Top-level third-party packages that ``statement`` loads in a fresh interpreter, beyond those that ``after`` has loaded."""
    program = (
        f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\nprint(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) - set(sys.stdlib_module_names) - {"megatron_ext"}


def test_loaded_by_sees_what_is_loaded() -> None:
    assert loaded_by("import yaml, numpy") >= {"yaml", "numpy"}
    assert "numpy" not in loaded_by("import yaml, numpy", after="import numpy")


def test_planning_needs_only_numpy() -> None:
    assert loaded_by("import megatron_ext.planning, megatron_ext.planning.options", after="import numpy, numpy.typing") == set()


def test_order_of_documents_needs_only_numpy() -> None:
    assert loaded_by("import megatron_ext.data.mixture", after="import numpy, numpy.typing") == set()


def test_kernels_and_precision_need_only_torch() -> None:
    assert not loaded_by("import megatron_ext.kernels, megatron_ext.precision") & HEAVY
