#!/usr/bin/env python3
"""Print what this machine offers to megatron_ext: CPU, GPUs, packages, compilers, and what a run would choose, with reasons.

    python tools/env_report.py

The output is plain text, to be pasted into a bug report. It holds no host name and no environment variable.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import Accelerator, survey
from megatron_ext.kernels.varlen_attention import BACKENDS, select_backend
from megatron_ext.parallel.device import choose_dtype, collective_backend, describe, local_device

# instruction sets that the kernels or PyTorch's GEMMs use, as Linux names them
_X86_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16")
_ARM_SETS = ("asimd", "asimdhp", "bf16", "sve")
_HEAD_DIM = 64

Section = dict[str, str]


def main() -> int:
    """Print the report; the result is the exit status 0."""
    sections = {
        "System": system(),
        "Processor": processor(Path("/proc/cpuinfo"), platform.machine()),
        "CUDA": cuda(),
        "Packages": packages("megatron_ext"),
        "Compilers": compilers(),
        "Optional accelerators": accelerators(survey(local_device())),
        "A run would choose": choices(local_device()),
    }
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, section in sections.items():
        table.add_row(Text(title))
        for name, value in section.items():
            table.add_row(Text(f"  {name}"), Text(value))
    console.print(table)
    return 0


def system() -> Section:
    """Operating system, Python and memory."""
    release = platform.freedesktop_os_release()["PRETTY_NAME"] if Path("/etc/os-release").exists() else platform.system()
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return {
        "os": f"{release}, {platform.system()} {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "memory": f"{total:.1f} GiB, {free:.1f} GiB free",
        "shared memory": f"{shutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB" if Path("/dev/shm").exists() else "no /dev/shm",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
    }


def processor(cpuinfo: Path, machine: str) -> Section:
    """Model, cores that this process may use and instruction sets, from Linux's ``cpuinfo`` of a ``machine`` such as x86_64."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    section = {"cores": f"{usable} usable of {os.cpu_count()}, {machine}"}
    if not cpuinfo.exists():
        return section | {"instruction sets": f"unknown: no {cpuinfo}"}
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", cpuinfo.read_text("utf-8"), flags=re.MULTILINE))
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = _X86_SETS if machine in ("x86_64", "AMD64") else _ARM_SETS
    return {
        "model": fields.get("model name", "unknown"),
        **section,
        "instruction sets": ", ".join(name for name in known if name in flags) or "none of those that matter",
        "does without": ", ".join(name for name in known if name not in flags) or "none of those that matter",
        "pytorch uses": torch.backends.cpu.get_cpu_capability(),
    }


def cuda() -> Section:
    """GPUs as the driver lists them, and whether this PyTorch can use them."""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    listed = _output("nvidia-smi", query, "--format=csv,noheader")
    gpus = listed.splitlines() if listed else []
    reason = "nvidia-smi lists no device" if shutil.which("nvidia-smi") else "nvidia-smi is not there, so there is no NVIDIA driver"
    section = {f"gpu {i}": gpus[i] for i in range(len(gpus))} or {"gpu": f"none: {reason}"}
    section |= _package(Requirement("triton"), "comes with CUDA builds of PyTorch")
    if torch.version.cuda is None:
        return section | {"pytorch": "cannot use a GPU: this is a CPU build"}
    if local_device().type != "cuda":
        return section | {"pytorch": f"built for CUDA {torch.version.cuda}, but sees no GPU"}
    return section | {"pytorch": f"built for CUDA {torch.version.cuda}, uses {describe(local_device())}"}


def packages(distribution: str) -> Section:
    """Version of a distribution and of each of its requirements, with the range that it accepts."""
    try:
        section = {distribution: importlib.metadata.version(distribution)}
    except importlib.metadata.PackageNotFoundError:
        return {distribution: "not installed; run: pip install -e ."}
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        extra = re.search(r'extra == "([^"]+)"', str(requirement.marker))
        note = f"wanted {requirement.specifier or 'in any version'}" + (f", optional, in the extra [{extra[1]}]" if extra else "")
        section |= _package(requirement, note)
    return section


def _package(requirement: Requirement, note: str) -> Section:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return {requirement.name: f"not installed ({note})"}
    fits = requirement.specifier.contains(version, prereleases=True)
    return {requirement.name: version if fits else f"{version}, which does not fit ({note})"}


def compilers() -> Section:
    """Versions of the compilers of csrc/, or what their absence means."""
    gxx = _output("g++", "--version")
    nvcc = re.search(r"release [\d.]+, V[\d.]+", _output("nvcc", "--version") or "")
    return {
        "g++": gxx.splitlines()[0] if gxx else "not found: the C++ kernels cannot be built",
        "nvcc": nvcc[0] if nvcc else "not found: the CUDA kernels cannot be built",
    }


def accelerators(surveyed: Iterable[Accelerator]) -> Section:
    """Which of the optional packages are present, what each would serve here if an option asked for it, and why not."""
    section = {}
    for each in surveyed:
        section[each.name] = f"{each.version or 'not installed'}; its adapter is written against {each.written_against}"
        section |= {f"  {service}": f"cannot: {obstacle}" if obstacle else "can" for service, obstacle in each.services.items()}
    return section


def choices(device: torch.device) -> Section:
    """What ``auto`` means here, and which attention backends can run, each with its reason."""
    dtype, reason = choose_dtype("auto", device)
    section = {
        "device": describe(device),
        "collectives": collective_backend(device),
        "dtype": f"{str(dtype).removeprefix('torch.')}: {reason}",
    }
    for name in ("auto", *BACKENDS):
        try:
            chosen, why = select_backend(name, device, dtype, _HEAD_DIM)
            section[f"attention {name}"] = f"{chosen} ({why})" if name == "auto" else "can run"
        except ConfigError as error:
            section[f"attention {name}"] = f"cannot run: {str(error).partition(';')[0]}"
    return section


def _output(*command: str) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
