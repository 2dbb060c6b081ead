"""Tools as modules: they lie outside of any package."""

import importlib.util
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(stem: str) -> ModuleType:
    """The module of ``tools/<stem>.py``, loaded anew."""
    spec = importlib.util.spec_from_file_location(f"{stem}_tool", TOOLS / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
