"""The smallest configuration that is whole, as a file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.config import RunConfig, load_config

SMALLEST = """\
run_dir: runs/small
tokenizer: tokenizers/small
data:
  sources:
    - {name: prose, path: corpora/prose}
  sequence_length: 128
  tokens_per_step: 1024
train:
  steps: 100
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A file that ``load_config`` accepts."""
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST, "utf-8")
    return path


@pytest.fixture
def load(config_file: Path) -> Callable[..., RunConfig]:
    """Load the smallest configuration with overrides."""
    return lambda *overrides: load_config(config_file, overrides)
