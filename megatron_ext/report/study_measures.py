"""What ``tools/study.py`` writes beside each run of a study about its checkpoints: a JSON object with ``settings`` and ``losses``."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import DataError


def read_losses(path: Path, of_what: str) -> Mapping[str, float]:
    """Losses by name, in nats per token; empty where there is no such file.

    Args:
        path: of the file.
        of_what: the losses are, for the message.

    Raises:
        DataError: the file is not one that ``tools/study.py`` wrote.
    """
    if not path.exists():
        return {}
    try:
        return {str(name): float(loss) for name, loss in json.loads(path.read_text("utf-8"))["losses"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not the losses {of_what}: {error!r}; remove it and run the study again") from None
