"""How csrc/ is built and loaded: each csrc/cpu/<stem>.cpp becomes a shared library with a C interface when it is first used.

The libraries know nothing of PyTorch, so they need no headers but the compiler's, build in seconds and survive every upgrade. They lie in
a cache directory under a name that says what they were built from: sources, flags, compiler and CPU.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import MegatronExtError

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")
"""No contraction to fused multiply-adds, so that every instruction set computes the same bits; no errno, so that roots are vectorized."""


class KernelBuildError(MegatronExtError, RuntimeError):
    """A kernel that cannot be built on this machine."""


@functools.cache
def load_library(stem: str) -> ctypes.CDLL:
    """The library made from csrc/cpu/``stem``.cpp, built first where the cache does not hold it. Raises as ``build_library``."""
    return ctypes.CDLL(str(build_library(stem)))


def build_all(sources: Path = SOURCES, cache: Path | None = None) -> list[Path]:
    """Build what the cache does not hold of all kernels in ``sources``/cpu; returns their libraries. Raises as ``build_library``."""
    return [build_library(source.stem, sources, cache) for source in sorted((sources / "cpu").glob("*.cpp"))]


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
    source = sources / "cpu" / f"{stem}.cpp"
    if not source.is_file():
        raise KernelBuildError(f"no kernel {stem}: {source} does not exist")
    cache = cache or cache_directory()
    compiler = find_compiler()
    library = cache / f"{stem}-{_fingerprint(source, sources / 'common', compiler)}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():  # another process may have built it meanwhile
                _compile(compiler, source, sources / "common", library)
    except OSError as error:
        raise KernelBuildError(f"built kernels cannot be kept in {cache} ({error}); set MEGATRON_EXT_CACHE to another folder") from error
    return library


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


def _compile(compiler: str, source: Path, headers: Path, library: Path) -> None:
    """Compile into a folder beside ``library`` and rename, so that ``library`` appears whole or not at all."""
    print(f"megatron_ext: building kernel {source.stem} with {compiler} (kept in {library.parent})", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        result = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{headers}", str(source), "-o", str(result)]
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


def _fingerprint(source: Path, headers: Path, compiler: str) -> str:
    """16 hexadecimal digits of everything that the library depends on."""
    digest = hashlib.sha256()
    for path in (source, *sorted(headers.glob("*.h"))):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    digest.update("\0".join((*FLAGS, _compiler_version(compiler), platform.system(), platform.machine(), _cpu_features())).encode())
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
