"""Packages that only look like the optional ones: files in a directory that Python searches first."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ext.kernels.accelerators import apex, flash_attn, transformer_engine

Install = Callable[..., None]
OF_ACCELERATORS = ("flash_attn", "transformer_engine", "apex", "amp_C", "fused_layer_norm_cuda")


def _forget() -> None:
    for adapter in (flash_attn, transformer_engine, apex):
        adapter.obstacle.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(name, version, {path: source}): a distribution and its modules, gone after the test."""
    for name in [name for name in sys.modules if name.split(".")[0] in OF_ACCELERATORS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, version: str, files: dict[str, str]) -> None:
        metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        for path, source in {metadata: f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}.items() | {
            tmp_path / path: source for path, source in files.items()
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, "utf-8")
        _forget()

    _forget()
    yield install
    for name in [name for name in sys.modules if name.split(".")[0] in OF_ACCELERATORS]:
        del sys.modules[name]
    _forget()
