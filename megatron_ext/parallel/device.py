"""The one place that knows which device a rank uses, which backend its collectives use and which dtype is fast there."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def local_device() -> torch.device:
    """The GPU of this rank (LOCAL_RANK of the launcher) if the machine has one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def activate(device: torch.device) -> None:
    """Make ``device`` the current one of this process, and let a CPU keep the memory of freed tensors for the next ones."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks of any size.

    By default it returns large ones to the kernel, which must then map and clear every page of every large tensor of every step again:
    up to a third of a training step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def estimated_device(name: str | None, gib: float | None) -> torch.device:
    """The device that an estimate of memory is for: ``name``; else a GPU where ``gib`` says how much one has; else that of this process."""
    if name is None and gib is None:
        return local_device()
    return torch.device(name or "cuda")


def collective_backend(device: torch.device) -> str:
    """torch.distributed backend that moves tensors of ``device``."""
    return "nccl" if device.type == "cuda" else "gloo"


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of parameters and activations, and why.

    Args:
        name: a key of ``DTYPES``, or "auto": bfloat16 where the device has instructions for it, else float32.
        device: where the model runs.
    """
    if name != "auto":
        return DTYPES[name], "train.dtype"
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16, "a GPU that is not here is taken to be fast at bfloat16"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, what = major >= 8, f"compute capability {major}.{minor}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        fast = "bf16" in _cpu_flags() or "amx" in _cpu_flags()
        what = f"CPU with {capability}"
    return (torch.bfloat16, f"{what} is fast at bfloat16") if fast else (torch.float32, f"{what} has no bfloat16 instructions")


def _cpu_flags() -> str:
    """Names of the bfloat16 instruction sets of this CPU, as Linux lists them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""
    return " ".join(flag for flag in flags.split() if flag in ("avx512_bf16", "amx_bf16", "bf16"))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on a GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: on Linux its peak begins with that of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        kibibytes = next(line.split()[1] for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
        return int(kibibytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def works_beside_host(device: torch.device) -> bool:
    """Whether the device is only given its work by the host, which goes on at once and waits where it reads a result."""
    return device.type != "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostTransfer:
    """Copies between a GPU and pinned host memory, on a stream of their own, beside the computation. On a CPU to the same memory.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, made when what computes ``tensor`` has finished. Only for ``to_device``, which waits for it."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
        if self._stream is None:
            return host.copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """``host`` on the device: a copy that has only begun, not to be read before ``wait_for``; on a CPU ``host`` itself."""
        if self._stream is None:
            return host
        with torch.cuda.stream(self._stream):
            return host.to(self._device, non_blocking=True)

    def wait_for(self, tensor: torch.Tensor) -> None:
        """Let the computation that comes next wait until ``tensor``, of ``to_device``, is there."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            tensor.record_stream(current)


def describe(device: torch.device) -> str:
    """Name of the device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads a rank"
