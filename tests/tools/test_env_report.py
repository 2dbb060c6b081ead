import importlib.metadata
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.kernels.accelerators import Accelerator, survey

TOOL = Path(__file__).parents[2] / "tools" / "env_report.py"


@pytest.fixture(scope="module")
def tool() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


def _program(directory: Path, name: str, output: str, status: int = 0) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n", "utf-8")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is searched for programs before /bin, which has none of those that the report asks."""
    cat = tmp_path / "cat"
    cat.symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_prints_plain_text_with_the_versions_of_this_environment() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    for title in ("System", "Processor", "CUDA", "Packages", "Compilers", "Optional accelerators"):
        assert title.split() in lines
    for package in ("torch", "deepspeed", "transformers", "numpy"):
        assert [package, importlib.metadata.version(package)] in lines
    assert "\x1b" not in done.stdout
    assert platform.node() not in done.stdout.split()


@pytest.mark.parametrize(
    ("machine", "text", "present", "absent"),
    [
        (
            "x86_64",
            "model name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512f avx512_bf16",
            "avx2, fma, avx512f, avx512_bf16",
            "f16c, amx_bf16",
        ),
        ("aarch64", "Features\t: fp asimd asimdhp bf16 sve", "asimd, asimdhp, bf16, sve", "none of those that matter"),
        ("x86_64", "processor\t: 0", "none of those that matter", "avx2, fma, f16c, avx512f, avx512_bf16, amx_bf16"),
    ],
)
def test_instruction_sets_are_those_of_cpuinfo(
    tool: SimpleNamespace, tmp_path: Path, machine: str, text: str, present: str, absent: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"{text}\n", "utf-8")
    section = tool.processor(cpuinfo, machine)
    assert (section["instruction sets"], section["does without"]) == (present, absent)
    assert section["model"] == ("Some CPU" if "Some CPU" in text else "unknown")
    assert machine in section["cores"]


def test_a_system_without_cpuinfo_says_so(tool: SimpleNamespace, tmp_path: Path) -> None:
    assert "unknown: no" in tool.processor(tmp_path / "absent", "arm64")["instruction sets"]


def test_packages_name_what_is_missing_and_what_does_not_fit(tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1", "torch<1", "no-such-package>=2; extra == 'cuda'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    section = tool.packages("megatron_ext")
    assert section["numpy"] == importlib.metadata.version("numpy")
    assert section["torch"] == f"{torch.__version__}, which does not fit (wanted <1)"
    assert section["no-such-package"] == "not installed (wanted >=2, optional, in the extra [cuda])"
    assert "not installed; run" in tool.packages("no-such-distribution")["no-such-distribution"]


def test_compilers_are_found_or_their_absence_is_explained(tool: SimpleNamespace, programs: Path) -> None:
    section = tool.compilers()
    assert section["g++"].startswith("not found") and section["nvcc"].startswith("not found")
    _program(programs, "g++", "g++ (Some Linux) 13.2.0\nCopyright")
    _program(programs, "nvcc", "Copyright\nCuda compilation tools, release 13.0, V13.0.88\nBuild 1")
    assert tool.compilers() == {"g++": "g++ (Some Linux) 13.2.0", "nvcc": "release 13.0, V13.0.88"}
    _program(programs, "g++", "broken", status=1)
    assert tool.compilers()["g++"].startswith("not found")


def test_gpus_are_those_of_the_driver_with_the_reason_if_there_is_none(
    tool: SimpleNamespace, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no NVIDIA driver" in tool.cuda()["gpu"]
    _program(programs, "nvidia-smi", "No devices were found", status=6)
    assert tool.cuda()["gpu"] == "none: nvidia-smi lists no device"
    _program(programs, "nvidia-smi", "NVIDIA H100, 81559 MiB, 9.0, 580.1\nNVIDIA H100, 81559 MiB, 9.0, 580.1")
    assert tool.cuda()["gpu 1"] == "NVIDIA H100, 81559 MiB, 9.0, 580.1"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert tool.cuda()["pytorch"] == "cannot use a GPU: this is a CPU build"


def test_choices_on_a_cpu_give_reasons(tool: SimpleNamespace) -> None:
    section = tool.choices(torch.device("cpu"))
    assert section["collectives"] == "gloo"
    assert section["attention auto"].startswith("sdpa (auto: ")
    assert section["attention dense"] == "can run"
    for backend in ("varlen", "flash_attn"):
        assert section[f"attention {backend}"].startswith("cannot run: ") and "needs a CUDA device" in section[f"attention {backend}"]


def test_accelerators_are_listed_with_what_each_would_serve_and_why_not(tool: SimpleNamespace) -> None:
    able = Accelerator("fast", "fast 1.0 to 1.2", "1.1", {"attention": None, "norm": "needs more"})
    absent = Accelerator("other", "other 3", None, {"optimizer": "needs the package other"})
    assert tool.accelerators([able, absent]) == {
        "fast": "1.1; its adapter is written against fast 1.0 to 1.2",
        "  attention": "can",
        "  norm": "cannot: needs more",
        "other": "not installed; its adapter is written against other 3",
        "  optimizer": "cannot: needs the package other",
    }


def test_the_three_accelerators_serve_nothing_on_a_cpu(tool: SimpleNamespace) -> None:
    section = tool.accelerators(survey(torch.device("cpu")))
    assert [name for name in section if not name.startswith(" ")] == ["TransformerEngine", "flash-attn", "apex"]
    served = {name.strip(): value for name, value in section.items() if name.startswith(" ")}
    assert served["attention"] == served["linear in nvfp4"] == "cannot: needs a CUDA device, not cpu"
    assert {"AdamW", "RMSNorm", "fp8_gemm, nvfp4_gemm"} < set(served) and all(value.startswith("cannot: ") for value in served.values())
