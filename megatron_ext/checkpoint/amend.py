"""Change what a whole checkpoint says of the run, and nothing of its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.manifest import STATE_FILE, read_state, seal


def amend_state(directory: Path, changes: Mapping[str, Any]) -> None:
    """Replace values of the trainer's state in one atomic write: a run that is killed meanwhile resumes from the old or the new one.

    Raises:
        CheckpointError: the state cannot be read.
    """
    state = {key: value for key, value in read_state(directory).items() if key != "sha256"}
    write_json(directory / STATE_FILE, seal({**state, **changes}))
