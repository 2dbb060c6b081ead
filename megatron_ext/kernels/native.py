"""How a kernel of csrc/ is called: which backend runs, what its C arguments are, what its error codes mean."""

import ctypes

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.build import load_library

INSTRUCTIONS = {"cpu": "", "cpu-avx512": "avx512", "cpu-avx2": "avx2", "cpu-portable": "portable"}
"""Backends on the CPU, and the instruction set that they ask for; "": the widest that the CPU has."""
BACKENDS = ("auto", "torch", *INSTRUCTIONS, "cuda")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of values, and their numbers in the C interface."""


def select_backend(name: str, device: torch.device) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for on ``device``, and why.

    ``auto`` is the compiled kernel of the device, which has the bits of ``torch``, the definition, that runs everywhere. Nothing is
    replaced by something else: where a compiled kernel cannot be built, it raises.

    Raises:
        ConfigError: ``name`` is none of ``BACKENDS``, or the tensor is on a device that the backend cannot reach.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; accepted are {', '.join(BACKENDS)}")
    compiled = device.type if device.type in ("cpu", "cuda") else "torch"
    if name == "auto":
        return compiled, f"auto: on {device.type}"
    if name != "torch" and name.split("-")[0] != compiled:
        raise ConfigError(f"backend is {name!r}, but the tensor is on {device}; able to run there: torch, {compiled}")
    return name, "as asked for"


def check_matrix(x: Tensor, of: str) -> None:
    """Raises ConfigError unless ``x`` is a matrix of a type that kernels take; ``of`` names the operation."""
    if x.ndim != 2 or x.dtype not in TYPES:
        raise ConfigError(f"{of} of {list(x.shape)} in {x.dtype}; accepted are [M, K] in {', '.join(map(str, TYPES))}")


def call(stem: str, function: str, backend: str, threads: int, *arguments: Tensor | torch.dtype | float | bool | None) -> None:
    """Call ``function`` of csrc/cpu/``stem``.cpp or csrc/cuda/``stem``.cu.

    Tensors become pointers (None: null), types of values their number as int32, bool int32, int int64, float float. After the
    arguments come the number of threads (0: as many as PyTorch uses) and the instruction set on the CPU, the current stream on CUDA.

    Raises:
        ConfigError: the CPU has not the instructions that ``backend`` asks for.
        MemoryError: the kernel has no memory for its own needs.
        RuntimeError: CUDA reports an error.
        KernelBuildError: the kernel cannot be built.
    """
    if backend == "cuda":
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            code = getattr(load_library(stem, "cuda"), function)(*map(_c_value, arguments), stream)
        if code:
            raise RuntimeError(f"{function} failed on {device} with CUDA error {code}")
        return
    instructions = INSTRUCTIONS[backend]
    rest = (ctypes.c_int64(threads or torch.get_num_threads()), ctypes.c_char_p(instructions.encode()))
    code = getattr(load_library(stem), function)(*map(_c_value, arguments), *rest)
    if code:
        raise {1: MemoryError(f"no memory for {function}"), 2: ConfigError(f"this CPU has no {instructions} instructions")}[code]


def _c_value(argument: Tensor | torch.dtype | float | bool | None) -> object:
    match argument:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case torch.dtype():
            return ctypes.c_int32(TYPES[argument])
        case bool():
            return ctypes.c_int32(argument)
        case int():
            return ctypes.c_int64(argument)
        case _:
            return ctypes.c_float(argument)
