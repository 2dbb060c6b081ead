"""How csrc/ is built and loaded: each csrc/cpu/<stem>.cpp becomes a shared library with a C interface when it is first used, and so does
each csrc/cuda/<stem>.cu for the architecture of the GPU.

The libraries know nothing of PyTorch, so they need no headers but the compiler's, build in seconds and survive every upgrade. They lie in
a cache directory under a name that says what they were built from: sources, flags, compiler, and CPU or architecture of the GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import MegatronExtError

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
"""No contraction to fused multiply-adds, so that every instruction set computes the same bits; neither errno nor traps, so that roots and
conditions are vectorized; no notes on how vectors would be passed, which are inlined."""
CUDA_FLAGS = ("-O3", "-std=c++17", "-shared", "-fmad=false", "--compiler-options=-fPIC", "-cudart=shared")
CUDA_ARCHITECTURES = ("80", "90a", "100a")
"""What ``build_all`` builds for where there is no GPU to ask."""


class KernelBuildError(MegatronExtError, RuntimeError):
    """A kernel that cannot be built on this machine."""


@functools.cache
def load_library(stem: str, kind: str = "cpu") -> ctypes.CDLL:
    """The library made from csrc/cpu/``stem``.cpp, built first where the cache does not hold it. Raises as ``build_library``.

    With ``kind`` "cuda" from csrc/cuda/``stem``.cu, for the current GPU.
    """
    library = build_library(stem) if kind == "cpu" else build_cuda_library(stem, present_architectures()[0])
    return ctypes.CDLL(str(library))


def build_all(sources: Path = SOURCES, cache: Path | None = None, architectures: Sequence[str] = ()) -> list[Path]:
    """Build what the cache does not hold of all kernels in ``sources``; returns their libraries. Raises as ``build_library``.

    Those in ``sources``/cuda are built where nvcc is installed, and else a line on stderr says that they are not.

    Args:
        sources: as of ``build_library``.
        cache: as of ``build_library``.
        architectures: of GPUs, as "90a"; none: those present, or CUDA_ARCHITECTURES where there is no GPU.
    """
    built = [build_library(source.stem, sources, cache) for source in sorted((sources / "cpu").glob("*.cpp"))]
    kernels = sorted((sources / "cuda").glob("*.cu"))
    if kernels and find_nvcc() is None:
        print(f"megatron_ext: no nvcc on the path: the {len(kernels)} kernels for CUDA are not built", file=sys.stderr, flush=True)
        return built
    wanted = architectures or (present_architectures() if kernels else []) or CUDA_ARCHITECTURES
    return built + [build_cuda_library(source.stem, architecture, sources, cache) for architecture in wanted for source in kernels]


def build_library(stem: str, sources: Path = SOURCES, cache: Path | None = None) -> Path:
    """Compile ``sources``/cpu/``stem``.cpp unless the cache holds the result already. Says on stderr that it builds, and how long it took.

    Any number of processes may call this at once: one of them builds, the others wait for it.

    Args:
        stem: name of the source without its suffix.
        sources: folder of the sources; headers in its ``common`` can be included.
        cache: folder of the libraries; default ``cache_directory()``.

    Returns:
        The shared library.

    Raises:
        KernelBuildError: there is no source, no compiler or no writable cache, or the compiler fails; its message is shown.
    """
    source = _found(sources / "cpu" / f"{stem}.cpp")
    return _build(source, sources / "common", find_compiler(), FLAGS, stem, cache or cache_directory())


def build_cuda_library(stem: str, architecture: str, sources: Path = SOURCES, cache: Path | None = None) -> Path:
    """The same for ``sources``/cuda/``stem``.cu and GPUs of one ``architecture``, as "80" or "90a", by nvcc."""
    source = _found(sources / "cuda" / f"{stem}.cu")
    compiler = find_nvcc()
    if compiler is None:
        raise KernelBuildError(
            f"kernel {stem} for CUDA needs nvcc, which is not on the path. Install the CUDA toolkit, 12.8 or later, and put its bin there"
        )
    flags = (*CUDA_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    return _build(source, sources / "common", compiler, flags, f"{stem}-sm_{architecture}", cache or cache_directory())


def present_architectures() -> list[str]:
    """Architectures of the GPUs that are present, the current one first, as nvcc names them: "80", "90a". Empty without a GPU."""
    # Not at the top: building for the CPU needs no PyTorch.
    import torch

    if not torch.cuda.is_available():
        return []
    current = torch.cuda.current_device()
    others = (device for device in range(torch.cuda.device_count()) if device != current)
    capabilities = dict.fromkeys(torch.cuda.get_device_capability(device) for device in (current, *others))
    return [f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in capabilities]


def find_nvcc() -> str | None:
    """nvcc on the path, in $CUDA_HOME or in /usr/local/cuda; None if there is none."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc") or next((found for home in homes if (found := shutil.which("nvcc", path=str(home)))), None)


def cache_directory() -> Path:
    """Where built kernels are kept: $MEGATRON_EXT_CACHE, or else ~/.cache/megatron_ext."""
    return Path(os.environ.get("MEGATRON_EXT_CACHE") or "~/.cache/megatron_ext").expanduser()


def find_compiler() -> str:
    """The C++ compiler: $CXX, or else the first of c++, g++ and clang++ on the path. Raises KernelBuildError if there is none."""
    wanted = os.environ.get("CXX")
    for candidate in (wanted,) if wanted else COMPILERS:
        if path := shutil.which(candidate):
            return path
    seen = f"CXX is {wanted!r}, which is no program on the path" if wanted else f"none of {', '.join(COMPILERS)} is on the path"
    raise KernelBuildError(
        f"the kernels need a C++17 compiler: {seen}. Install g++ (Debian, Ubuntu: apt-get install g++; Fedora, RHEL: dnf install gcc-c++; "
        "conda: conda install -c conda-forge cxx-compiler), or set CXX to a compiler"
    )


def _found(source: Path) -> Path:
    if not source.is_file():
        raise KernelBuildError(f"no kernel {source.stem}: {source} does not exist")
    return source


def _build(source: Path, headers: Path, compiler: str, flags: Sequence[str], name: str, cache: Path) -> Path:
    """The library ``name`` made from ``source``, from the cache if it is there."""
    library = cache / f"{name}-{_fingerprint(source, headers, compiler, flags)}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():  # another process may have built it meanwhile
                _compile(compiler, flags, source, headers, library)
    except OSError as error:
        raise KernelBuildError(f"built kernels cannot be kept in {cache} ({error}); set MEGATRON_EXT_CACHE to another folder") from error
    return library


def _compile(compiler: str, flags: Sequence[str], source: Path, headers: Path, library: Path) -> None:
    """Compile into a folder beside ``library`` and rename, so that ``library`` appears whole or not at all."""
    print(f"megatron_ext: building kernel {source.stem} with {compiler} (kept in {library.parent})", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        result = Path(folder) / library.name
        command = [compiler, *flags, f"-I{headers}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            message = (done.stderr or done.stdout).strip()
            raise KernelBuildError(f"building kernel {source.stem} failed (exit code {done.returncode}): {' '.join(command)}\n{message}")
        os.replace(result, library)
    print(f"megatron_ext: built kernel {source.stem} in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(source: Path, headers: Path, compiler: str, flags: Sequence[str] | None = None) -> str:
    """16 hexadecimal digits of everything that the library depends on."""
    digest = hashlib.sha256()
    for path in (source, *sorted(headers.glob("*.h")), *sorted(source.parent.glob("*.h"))):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    digest.update(
        "\0".join((*(flags or FLAGS), _compiler_version(compiler), platform.system(), platform.machine(), _cpu_features())).encode()
    )
    return digest.hexdigest()[:16]


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelBuildError(f"{compiler} --version does not run: {error}") from error


@functools.cache
def _cpu_features() -> str:
    """Instruction sets as the kernel of Linux names them; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
