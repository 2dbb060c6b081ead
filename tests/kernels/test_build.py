import ctypes
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.kernels import build
from megatron_ext.kernels.build import KernelBuildError, build_all, build_cuda_library, build_library, load_library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
BUILD_ALONE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.build_library("tiny", Path(sys.argv[2]), Path(sys.argv[3])))
"""
"""Without the package, whose import takes seconds."""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A csrc with one kernel that includes a header."""
    folder = tmp_path / "csrc"
    for name, text in {"cpu/tiny.cpp": SOURCE, "common/answer.h": "#define ANSWER 42\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes in a file, whose path is returned, that it compiled."""
    log, program = tmp_path / "compiled", tmp_path / "logging-c++"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ echo once >> {log}; sleep 0.3; }}\nexec c++ "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(program))
    return log


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def test_second_call_finds_the_library(sources: Path, tmp_path: Path, compiler: Path, capfd: pytest.CaptureFixture) -> None:
    first = build_library("tiny", sources, tmp_path / "cache")
    said = capfd.readouterr().err
    assert "building kernel tiny" in said and "built kernel tiny in" in said and str(tmp_path / "cache") in said
    assert build_library("tiny", sources, tmp_path / "cache") == first
    assert capfd.readouterr().err == ""
    assert compiler.read_text().split() == ["once"]
    assert answer(first) == 42


@pytest.mark.parametrize("change", ["source", "header", "flags", "compiler", "cpu"])
def test_everything_a_library_depends_on_has_it_built_anew(
    change: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name() -> str:
        return build._fingerprint(sources / "cpu/tiny.cpp", sources / "common", shutil.which("c++"))

    before = name()
    assert name() == before
    if change == "source":
        (sources / "cpu/tiny.cpp").write_text(SOURCE + "// other\n")
    elif change == "header":
        (sources / "common/answer.h").write_text("#define ANSWER 43\n")
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    elif change == "compiler":
        monkeypatch.setattr(build, "_compiler_version", lambda compiler: "another version")
    else:
        monkeypatch.setattr(build, "_cpu_features", lambda: "flags: other")
    assert name() != before


def test_broken_source_shows_what_the_compiler_says(sources: Path, tmp_path: Path) -> None:
    (sources / "cpu/tiny.cpp").write_text('extern "C" int answer() { return undeclared_thing; }\n')
    with pytest.raises(KernelBuildError, match=r"(?s)building kernel tiny failed.*tiny.cpp:1.*undeclared_thing"):
        build_library("tiny", sources, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"], "nothing half-built stays"


def test_processes_that_need_a_kernel_at_once_build_it_once(sources: Path, tmp_path: Path, compiler: Path) -> None:
    command = [sys.executable, "-c", BUILD_ALONE, build.__file__, str(sources), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    libraries = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(libraries) == 1 and answer(Path(libraries.pop())) == 42
    assert compiler.read_text().split() == ["once"]


def test_a_killed_build_leaves_the_cache_usable(sources: Path, tmp_path: Path, compiler: Path) -> None:
    command = [sys.executable, "-c", BUILD_ALONE, build.__file__, str(sources), str(tmp_path / "cache")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not compiler.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list((tmp_path / "cache").glob("tiny-*.so"))
    assert answer(build_library("tiny", sources, tmp_path / "cache")) == 42


def test_missing_compiler_says_what_to_install(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"need a C\+\+17 compiler.*apt-get install g\+\+"):
        build_library("tiny", sources, tmp_path / "cache")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match="CXX is 'no-such-compiler'"):
        build_library("tiny", sources, tmp_path / "cache")


def test_cache_that_cannot_be_made_names_the_variable(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGATRON_EXT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelBuildError, match="MEGATRON_EXT_CACHE"):
        build_library("tiny", sources)


def test_unknown_kernel_is_named(sources: Path) -> None:
    with pytest.raises(KernelBuildError, match="no kernel missing"):
        build_library("missing", sources)


def test_build_all_builds_every_source(sources: Path, tmp_path: Path) -> None:
    (sources / "cpu/other.cpp").write_text(SOURCE)
    assert [path.name.split("-")[0] for path in build_all(sources, tmp_path / "cache")] == ["other", "tiny"]


def test_cuda_kernels_are_built_for_each_architecture(sources: Path, tmp_path: Path) -> None:
    if build.find_nvcc() is None:
        pytest.skip("nvcc is neither on the path nor in /usr/local/cuda")
    (sources / "cuda").mkdir()
    (sources / "cuda/tiny.cu").write_text(SOURCE.replace("extern", "__global__ void nothing() {}\nextern"))
    library = build_cuda_library("tiny", "80", sources, tmp_path / "cache")
    assert library.name.startswith("tiny-sm_80-") and library == build_cuda_library("tiny", "80", sources, tmp_path / "cache")
    names = [path.name.rsplit("-", 1)[0] for path in build_all(sources, tmp_path / "cache", ["80", "90a"])]
    assert names == ["tiny", "tiny-sm_80", "tiny-sm_90a"]
    (sources / "cuda/tiny.cu").write_text("__global__ void nothing() { undeclared_thing; }\n")
    with pytest.raises(KernelBuildError, match=r"(?s)building kernel tiny failed.*undeclared_thing"):
        build_cuda_library("tiny", "80", sources, tmp_path / "cache")


def test_without_nvcc_cuda_kernels_are_left_out_and_that_is_said(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (sources / "cuda").mkdir()
    (sources / "cuda/tiny.cu").write_text(SOURCE)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert [path.name.split("-")[0] for path in build_all(sources, tmp_path / "cache")] == ["tiny"]
    assert "no nvcc on the path: the 1 kernels for CUDA are not built" in capfd.readouterr().err
    with pytest.raises(KernelBuildError, match="for CUDA needs nvcc"):
        build_cuda_library("tiny", "80", sources, tmp_path / "cache")


def test_kernels_of_the_package_are_found_and_loaded_once() -> None:
    assert (build.SOURCES / "cpu" / "adamp.cpp").is_file()
    assert load_library("adamp") is load_library("adamp")


def test_sources_travel_with_the_package(tmp_path: Path) -> None:
    """What a wheel is made from holds the files that megatron_ext/csrc links to."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "*.egg-info", "tests", ".venv", "runs", "build")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "megatron_ext" / "csrc"
    assert not built.is_symlink()
    expected = {
        path.relative_to(ROOT / "csrc") for folder in ("cpu", "common", "cuda") for path in (ROOT / "csrc" / folder).glob("*.[ch]*")
    }
    assert {path.relative_to(built) for path in built.rglob("*") if path.is_file()} >= expected
