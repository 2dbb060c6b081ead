"""Triton without a GPU: programs in its interpreter, and kernels compiled for GPUs that are not here."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def run_program(program: Callable[[], None], *, interpret: bool) -> None:
    """Call a function of a test module in a process of its own: Triton reads how to run when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from {program.__module__} import {program.__name__}; {program.__name__}()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def compiled(kernel: Any, architecture: int, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What Triton makes of a kernel: ``ptx``, ``cubin`` and what lies between, by name.

    Args:
        kernel: a function that ``triton.jit`` was applied to.
        architecture: compute capability times 10, such as 90.
        types: of the kernel's arguments, and perhaps of others, as Triton writes them: ``*fp32``, ``i32``.
        constants: values of its ``constexpr`` arguments, and perhaps of others.
        options: of the compiler.
    """
    compiler, backend = importlib.import_module("triton.compiler"), importlib.import_module("triton.backends.compiler")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: (types | dict.fromkeys(constants, "constexpr"))[name] for name in kernel.arg_names}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = backend.GPUTarget("cuda", architecture, 32)
    return compiler.compile(source, target=target, options={"enable_fp_fusion": False, **options}).asm
