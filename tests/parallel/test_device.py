import subprocess
import sys

import pytest
import torch

from megatron_ext.parallel import device

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_a_named_dtype_is_taken(name: str) -> None:
    assert device.choose_dtype(name, CPU) == (getattr(torch, name), "train.dtype")


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ("amx_bf16", torch.bfloat16, "is fast at bfloat16"),
        ("avx512_bf16", torch.bfloat16, "is fast at bfloat16"),
        ("", torch.float32, "has no"),
    ],
)
def test_auto_looks_at_the_instructions_of_the_cpu(monkeypatch: pytest.MonkeyPatch, flags: str, dtype: torch.dtype, reason: str) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    chosen, why = device.choose_dtype("auto", CPU)
    assert chosen == dtype and why.startswith("CPU with ") and reason in why


def test_backend_follows_the_device() -> None:
    assert [device.collective_backend(torch.device(kind)) for kind in ("cpu", "cuda")] == ["gloo", "nccl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which local_device takes")
def test_without_a_gpu_the_device_is_the_cpu() -> None:
    assert device.local_device() == CPU
    device.activate(CPU)
    device.synchronize(CPU)
    assert device.describe(CPU) == f"CPU, {torch.get_num_threads()} threads a rank"


def test_peak_memory_sees_an_allocation_that_was_freed() -> None:
    code = (
        "import torch; from megatron_ext.parallel.device import peak_memory_bytes as peak; cpu = torch.device('cpu');"
        "before = peak(cpu); torch.ones(2**26); print(before, peak(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**27 < after - before < 2**30, "256 MiB were touched"
